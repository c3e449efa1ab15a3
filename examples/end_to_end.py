"""From a dense checkpoint to a trained and measured mixture, read top to bottom.

python examples/end_to_end.py                       # the embedded parent and the standard library's text
python examples/end_to_end.py MODEL_FOLDER OUT      # your own LLaMA, Mistral or Phi-3 (others: another `target`)
"""

import sys
from pathlib import Path

import prismoe
from prismoe.demo import PARENT
from prismoe.demo.text import write_domains

source = Path(sys.argv[1]) if len(sys.argv) > 1 else PARENT
out = Path(sys.argv[2]) if len(sys.argv) > 2 else Path("runs/end-to-end")

# 1. Decide which neurons become which expert. A plan speaks of neurons, never of tensor names.
plan = prismoe.make_plan(source, method="random", num_experts=8, top_k=2, seed=0)

# 2. Write the mixture as a stock Mixtral folder: safetensors are streamed, never loaded whole.
prismoe.convert(source, plan, target="mixtral", out=out / "moe")

# 3. Prove it: reloaded by stock transformers, all experts on equals the dense model.
certificate = prismoe.verify(out / "moe", source=source)
for check in certificate.checks:
    print(f"{check.name:12} {check.measured:.1e}  {check.meaning}")

# 4. Text to token shards, one folder per domain.
text = write_domains(out / "text")
sources = {name: prismoe.DomainSource(train=(str(a),), heldout=(str(b),)) for name, (a, b) in text.items()}
prepared = prismoe.prepare(sources, tokenizer=source, out=out / "data")
domains = [domain.folder for domain in prepared.domains]

# 5. Train it back on weighted domains. Run the script again after an interruption and it continues.
settings = prismoe.PretrainConfig(steps=100, seq_len=256, batch_size=16, lr=1e-3, warmup_steps=10)
trained = prismoe.pretrain(out / "moe", settings, domains=domains, weights="proportional", out=out / "train")

# 6. Measure: the parent, the mixture before training, the mixture after.
models = {"dense": source, "step 0": out / "moe", "trained": trained.model}
scores = prismoe.evaluate(models, domains, seq_len=256, max_tokens=20_000)
for score in scores.scores:
    print(f"{score.domain:12} {score.model:8} perplexity {score.perplexity:10.2f}  {score.bits_per_byte:.3f} bits/byte")
