"""The loss in parts against the definition in float64, on stock classes and in whole runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prismoe.train import head, logits
from prismoe.train.experts import use_experts
from prismoe.train.head import head_factor, text_loss
from prismoe.train.metrics import read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.trainer import text_loss as in_training
from tests.training import domain_folder, tiny_moe

SIZES = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 53},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def model_of(model_type: str, **more: object):
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, **more))
    with torch.no_grad():  # logits of some size: the smallest slip shows
        model.get_output_embeddings().weight.normal_()
    use_experts(model, "eager")
    return model.double()


def batch():
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(3, 53, (3, 11), generator=draw)
    labels_BT = ids_BT.clone()
    labels_BT[0, 4:7] = labels_BT[2, -1] = -100
    return ids_BT, labels_BT


def by_definition(model, ids_BT, labels_BT, num_tokens):
    """Summed loss over `num_tokens` and each token's, from whole logits: the formula, in float64."""
    log_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1].double().log_softmax(dim=-1)
    kept = labels_BT[:, 1:] != -100
    loss_BT = -log_BTV.gather(-1, labels_BT[:, 1:].clamp_min(0)[..., None])[..., 0] * kept
    return loss_BT.sum() / num_tokens, loss_BT


@pytest.fixture
def small_parts(monkeypatch):
    """Five tokens at a time, from the first logit on."""
    monkeypatch.setattr(logits, "LARGEST", 0)
    monkeypatch.setattr(logits, "ROWS", 5)


CASES = {
    "llama": ("llama", {"tie_word_embeddings": False}, 1.0),
    "tied": ("llama", {"tie_word_embeddings": True}, 1.0),
    "mixtral": ("mixtral", {"num_local_experts": 4}, 1.0),
    "granite": ("granite", {"logits_scaling": 6.0}, 1 / 6),
    "cohere2": ("cohere2", {"logit_scale": 0.25}, 0.25),
    "bias": ("llama", {"tie_word_embeddings": False}, 1.0),
    "gemma2": ("gemma2", {"final_logit_softcapping": 30.0}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_exact(case, small_parts, monkeypatch):
    """Every parameter's gradient to 1e-7 of its largest number; a class that does more to its logits is left whole."""
    model_type, more, factor = CASES[case]
    model = model_of(model_type, **more)
    if case == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(53, dtype=torch.float64))
    found = head_factor(model)
    assert (found is None) if factor is None else found == pytest.approx(factor, rel=1e-6)
    sizes, linear = [], torch.nn.functional.linear

    def counted(x, weight, bias=None):
        if x.ndim == 2 and len(weight) == 53:
            sizes.append(len(x))
        return linear(x, weight, bias)

    monkeypatch.setattr(head.F, "linear", counted)
    ids_BT, labels_BT = batch()
    total, loss_BT = text_loss(model, ids_BT, labels_BT, num_tokens=17.0)
    (3 * total).backward()
    monkeypatch.undo()
    assert (sizes == [5] * 6 + [3]) == (factor is not None)
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected, each_BT = by_definition(model, ids_BT, labels_BT, 17.0)
    (3 * expected).backward()
    rel = 1e-6 if factor is None else 1e-7  # norms of stock classes compute in float32
    assert total.item() == pytest.approx(expected.item(), rel=rel)
    torch.testing.assert_close(loss_BT.double(), each_BT.detach(), rtol=rel, atol=rel)
    assert not loss_BT.requires_grad
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert float((got[name] - parameter.grad).abs().max()) <= rel * scale, name
    assert "forward" not in model.lm_head.__dict__
    assert "forward" not in model.base_model.__dict__


def test_the_function_is_its_definition_in_float64():
    """Loss, and gradients of hidden states, matrix and bias, for tokens that do not fill the last part."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 4), (9, 4), (9,))]
    labels_T = torch.tensor([0, 8, -100, 3, 3, 5, -100])
    total, loss_T = head._LossInParts.apply(*leaves, labels_T, 0.3, 0.5, 3)
    (2 * total).backward()
    found = [leaf.grad.clone() for leaf in leaves]
    hidden_TD, weight_VD, bias_V = leaves
    log_TV = (0.5 * (hidden_TD @ weight_VD.t() + bias_V)).log_softmax(dim=-1)
    expected_T = -log_TV[torch.arange(7), labels_T.clamp_min(0)] * (labels_T != -100)
    slopes = torch.autograd.grad(2 * 0.3 * expected_T.sum(), leaves)
    torch.testing.assert_close(loss_T, expected_T.detach(), rtol=1e-13, atol=1e-13)
    assert total.item() == pytest.approx(0.3 * expected_T.sum().item(), rel=1e-13)
    for got, slope in zip(found, slopes, strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-12, atol=1e-13)
    frozen = torch.randn(9, 4, dtype=torch.float64)  # no gradient is made that nobody asked for
    total, _ = head._LossInParts.apply(hidden_TD, frozen, None, labels_T, 0.3, 0.5, 3)
    assert [slope is None for slope, _ in total.grad_fn.slopes] == [False, True, True]


def test_small_batches_are_computed_whole():
    """Up to 2^25 logits nothing changes: 64 x 512 tokens of 1,024 words are the last of them."""
    assert logits.rows_at_once(32768, 1024) == 0
    assert logits.rows_at_once(32768, 1025) == 512
    assert logits.rows_at_once(512, 10**6) == 0
    assert logits.logit_bytes(2048, 32000) == 12 * 512 * 32000
    assert logits.logit_bytes(100, 32000) == 12 * 100 * 32000
    assert in_training is text_loss


def test_a_run_in_parts_has_the_same_log(tmp_path, small_parts):
    """Losses, domain losses, norms and held-out losses, with a router policy, recomputed layers and in bfloat16."""
    source = tiny_moe(tmp_path / "moe")
    domain = domain_folder(tmp_path / "a", tokenizer=source / "tokenizer.json")
    base = {"steps": 3, "seq_len": 32, "batch_size": 6, "warmup_steps": 1, "lr": 1e-3, "threads": 1, "recompute": True}
    for precision, rel in (("fp32", 1e-5), ("bf16", 2e-2)):
        config = PretrainConfig(**base, precision=precision, router="noisy_topk", max_epochs=50.0)
        logs = []
        for largest in (0, 1 << 25):
            logits.LARGEST = largest  # put back by the fixture
            out = tmp_path / f"{precision}-{largest}"
            pretrain(source, config, domains=[domain], out=out)
            logs.append(read_metrics(out / "metrics.jsonl"))
        for parts, whole in zip(*logs, strict=True):
            for key in ("loss", "gradient_norm", "router_loss", "by_domain"):
                assert parts.get(key) == (pytest.approx(whole[key], rel=rel) if key in whole else None)
            if "heldout" in whole:
                assert parts["heldout"]["a"]["loss"] == pytest.approx(whole["heldout"]["a"]["loss"], rel=rel)


PEAK = """
import re, torch
from pathlib import Path
from prismoe.train import head, logits
torch.manual_seed(0)
weight = torch.nn.Linear(8, 32000, bias=False)
hidden = torch.randn(1, 2048, 8, requires_grad=True)
class Stock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lm_head, self.base_model, self.device = weight, torch.nn.Identity(), torch.device("cpu")
    def get_output_embeddings(self):
        return self.lm_head
    def forward(self, input_ids, use_cache):
        from types import SimpleNamespace
        found = self.base_model(hidden)
        return SimpleNamespace(logits=self.lm_head(getattr(found, "last_hidden_state", found)))
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
ids = torch.randint(0, 32000, (1, 2048))
head.head_factor(Stock())
for largest in (1 << 25, 1 << 40):
    logits.LARGEST = largest
    Path("/proc/self/clear_refs").write_text("5")  # the greatest so far is what there is now
    before = most()
    head.text_loss(Stock(), ids, ids, num_tokens=2047.0)[0].backward()
    print(1024 * (most() - before))
"""


def test_the_logits_are_never_whole_in_memory():
    """2048 tokens of 32,000 words: 262 MB of logits, and as much for their gradient; 512 of them: 66 MB."""
    root = Path(__file__).resolve().parent.parent
    child = subprocess.run([sys.executable, "-c", PEAK], cwd=root, capture_output=True, text=True, check=True)
    parts, whole = map(int, child.stdout.split())
    assert parts < 250e6
    assert whole > 500e6
