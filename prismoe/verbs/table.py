"""Every verb and every option of the command line: what the parser accepts, and what the help pages show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prismoe.verbs import chatting, experts, filters, folders, machine, mixing, routing, show, stages, tuning
from prismoe.verbs.job import Job

__all__ = ["FLAGS", "SUBJECT", "VERBS", "Flag", "Verb", "takers"]

FEW = 3
SUBJECT = ("[CONFIG.yaml | MODEL | RUN_FOLDER]",)
SETTINGS = ("--out", "--seed", "--force", "--for", "--dry-run")
EVERY = ("plan", "convert", "verify", "calibrate", "recover", "pretrain", "data", "eval", "trace")


@dataclass(frozen=True)
class Verb:
    """What its help shows and the parser goes by.

    `keys` are the config sections that the verb reads (None: it reads no config), `options` a dataclass of its own
    ones. `takes` are its paths, one each, as the usage has them (the last one any number where it ends in dots), and
    `flags` those of `FLAGS` that it accepts beside the common ones: --dry-run where there is something to check before
    the work itself.
    """

    work: Callable[[Job], dict[str, Any]]
    what: str
    keys: tuple[str, ...] | None = None
    options: str = ""
    takes: tuple[str, ...] = SUBJECT
    flags: tuple[str, ...] = SETTINGS

    def usage(self, name: str) -> str:
        """The line of a command."""
        pairs = ["[section.key=value ...]"] if self.keys is not None else ["[key=value ...]"] if self.options else []
        return " ".join(["prismoe", name, *self.takes, *pairs, "[options]"])


VERBS: dict[str, Verb] = {
    "plan": Verb(
        stages.plan,
        "decide which neurons become which expert, and what would come out",
        ("plan", "convert"),
        flags=(*SETTINGS, "--compare"),
    ),
    "convert": Verb(stages.stages, "write the mixture as a stock Hugging Face folder", ("plan", "convert")),
    "verify": Verb(
        stages.verify,
        "prove that the mixture is the dense model, cut as planned",
        ("verify",),
        takes=("[CONFIG.yaml | RUN_FOLDER | CONVERTED]",),
    ),
    "sift": Verb(stages.stages, "drop text that is not worth training on, with an audit to look at", ("data",)),
    "train-filter": Verb(
        filters.train_filter,
        "a linear filter from texts to keep and texts to drop",
        options="TrainFilterOptions",
        takes=(),
        flags=("--out", "--seed", "--force"),
    ),
    "prepare": Verb(stages.prepare, "turn the text of each domain into tokens", ("data",), flags=(*SETTINGS, "--part")),
    "calibrate": Verb(stages.stages, "measure on text what a plan looks at", ("calibrate", "plan", "data")),
    "recover": Verb(
        stages.stages, "have each layer of the mixture learn its dense FFN, from few tokens", ("recover", "data")
    ),
    "pretrain": Verb(
        stages.stages,
        "train the mixture on the weighted domains",
        ("pretrain", "data"),
        flags=(*SETTINGS, "--max-steps"),
    ),
    "tune": Verb(
        tuning.tune,
        "instruction-tune a model folder on conversations",
        ("tune",),
        flags=(*SETTINGS, "--max-steps"),
    ),
    "chat": Verb(
        chatting.chat,
        "talk to a model in the terminal; /help there; experts=true shows each token's experts",
        options="ChatOptions",
        takes=("MODEL",),
        flags=("--seed",),
    ),
    "generate": Verb(
        chatting.generate,
        "what a model writes after each prompt of a file (or prompt=TEXT), as JSON lines",
        options="GenerateOptions",
        takes=("MODEL", "[FILE]"),
        flags=("--out", "--seed", "--force"),
    ),
    "mt-bench": Verb(
        chatting.mt_bench,
        "of a model: answer MT-Bench's questions; of a folder of answers: have them judged",
        options="MtBenchOptions",
        takes=("MODEL | ANSWERS",),
        flags=("--out", "--seed", "--force"),
    ),
    "eval": Verb(stages.stages, "held-out text and benchmarks, several models side by side", ("eval", "data")),
    "trace": Verb(
        routing.trace,
        "what the routers do with each domain, of a run or of MODEL DATA",
        ("trace", "data"),
        takes=("[CONFIG.yaml | RUN_FOLDER | MODEL]", "[DATA]"),
        flags=("--out", "--seed", "--force", "--for"),
    ),
    "report": Verb(stages.stages, "write the run's report.html", (), takes=("[CONFIG.yaml | RUN_FOLDER]",)),
    "run": Verb(
        stages.stages,
        "all of these into one run folder, finished stages kept",
        EVERY,
        flags=(*SETTINGS, "--max-steps"),
    ),
    "import": Verb(
        folders.import_,
        "a LLaMA-MoE checkpoint as a stock mixture",
        options="ImportOptions",
        takes=("MODEL",),
        flags=("--out", "--seed", "--force", "--dry-run"),
    ),
    "densify": Verb(
        folders.densify,
        "lay the experts together again: a dense model",
        options="DensifyOptions",
        takes=("MODEL",),
        flags=("--out", "--force", "--dry-run"),
    ),
    "similarity": Verb(
        experts.similarity,
        "how alike experts are, to each other, a dense model and an earlier checkpoint",
        takes=("MODEL | RUN_FOLDER", "[OTHER ...]"),
        flags=("--out", "--force"),
    ),
    "prune-experts": Verb(
        experts.prune_experts,
        "a mixture without the experts that a trace saw least",
        options="PruneOptions",
        takes=("MODEL | RUN_FOLDER",),
        flags=("--out", "--force", "--dry-run"),
    ),
    "reference-loss": Verb(
        mixing.reference_loss,
        "held-out losses of a model by domain, for dynamic mixing rules",
        options="ReferenceOptions",
        takes=("MODEL", "DATA"),
        flags=("--out",),
    ),
    "show": Verb(
        show.show,
        "describe a run, a model, a plan (with a picture), a domain or a config",
        options="ShowOptions",
        takes=("PATH",),
        flags=("--out", "--dry-run"),
    ),
    "doctor": Verb(machine.doctor, "a paste-ready picture of the machine and the versions", takes=(), flags=()),
    "demo": Verb(
        machine.demo,
        "the whole way on an embedded model and text, without network",
        EVERY,
        takes=(),
        flags=("--out", "--seed", "--force", "--dry-run"),
    ),
}


@dataclass(frozen=True)
class Flag:
    """An option that begins with dashes: `value` is what follows it, word by word, and `every` whether all verbs do."""

    value: str
    what: str
    every: bool = False
    name: str | None = None

    @property
    def parsed(self) -> dict[str, Any]:
        """How argparse reads it."""
        if not self.value:
            return {"action": "store_true"}
        words = len(self.value.split())
        return {"dest": self.name, "type": int if self.value == "N" else str, "nargs": words if words > 1 else None}


FLAGS: dict[str, Flag] = {
    "--out": Flag("PATH", "what is written: the run folder (the config's `out`), of some verbs a folder or file"),
    "--seed": Flag("N", "of everything that draws (the config's `seed`)"),
    "--dry-run": Flag("", "check everything, estimate, write nothing"),
    "--force": Flag("", "make again what was made with other settings"),
    "--offline": Flag("", "open no socket", every=True),
    "--no-verify": Flag("", "read finished folders without hashing their files first", every=True),
    "--for": Flag(
        "A,B",
        "choose a target that is right in these engines (`convert.engines`): transformers5, transformers4,\n"
        "vllm, sglang, gguf, mlx; widths: convert.pad_to=256 for K-quants of gguf, 128 x ranks for block FP8",
        name="engines",
    ),
    "--compare": Flag("A B", "how far two plan files agree"),
    "--part": Flag(
        "I/N",
        "only the I-th of N shares of the work, then once without it; a Slurm array of 64:\n"
        "sbatch --array=1-64 --wrap 'prismoe prepare CONFIG.yaml --part $SLURM_ARRAY_TASK_ID/64'",
    ),
    "--max-steps": Flag("N", "train N steps at most in this command, saved; the same command continues"),
    "--json": Flag("", "one JSON object on stdout, nothing else", every=True),
    "--debug": Flag("", "the traceback of an error", every=True),
    "--version": Flag("", "version", every=True),
}


def takers(name: str) -> str:
    """The verbs that accept an option beside the common ones, where they are few."""
    verbs = [verb for verb, found in VERBS.items() if name in found.flags]
    return " or ".join(", ".join(verbs).rsplit(", ", 1)) if len(verbs) <= FEW else ""
