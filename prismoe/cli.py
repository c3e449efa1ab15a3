"""The command line: one table of verbs. Results on stdout, progress and errors on stderr, exit codes from errors.py."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from prismoe.errors import InputError, InterruptedRun, PrismoeError, ResourceError, UsageError
from prismoe.verbs import chatting, experts, filters, folders, machine, mixing, routing, show, stages, tuning
from prismoe.verbs.job import Job

if TYPE_CHECKING:
    from prismoe.console import Screen

__all__ = ["main"]


@dataclass(frozen=True)
class Verb:
    """`keys` are the config sections that the verb reads, `options` a dataclass of its own ones, for its help.

    `dry` says whether there is something to check before the work itself.
    """

    work: Callable[[Job], dict[str, Any]]
    what: str
    keys: tuple[str, ...] = ()
    options: str = ""
    dry: bool = True


VERBS: dict[str, Verb] = {
    "plan": Verb(stages.plan, "decide which neurons become which expert, and what would come out", ("plan", "convert")),
    "convert": Verb(stages.stages, "write the mixture as a stock Hugging Face folder", ("plan", "convert")),
    "verify": Verb(stages.verify, "prove that the mixture is the dense model, cut as planned", ("verify",)),
    "sift": Verb(stages.stages, "drop text that is not worth training on, with an audit to look at", ("data",)),
    "train-filter": Verb(
        filters.train_filter,
        "a linear filter from texts to keep and texts to drop",
        options="TrainFilterOptions",
        dry=False,
    ),
    "prepare": Verb(stages.prepare, "turn the text of each domain into tokens", ("data",)),
    "calibrate": Verb(stages.stages, "measure on text what a plan looks at", ("calibrate", "plan", "data")),
    "recover": Verb(
        stages.stages, "have each layer of the mixture learn its dense FFN, from few tokens", ("recover", "data")
    ),
    "pretrain": Verb(stages.stages, "train the mixture on the weighted domains", ("pretrain", "data")),
    "tune": Verb(tuning.tune, "instruction-tune a model folder on conversations", ("tune",)),
    "chat": Verb(
        chatting.chat,
        "MODEL: talk to it in the terminal; /help there; experts=true shows each token's experts",
        options="ChatOptions",
        dry=False,
    ),
    "generate": Verb(
        chatting.generate,
        "MODEL FILE (or prompt=TEXT): what it writes after each prompt, as JSON lines",
        options="GenerateOptions",
        dry=False,
    ),
    "mt-bench": Verb(
        chatting.mt_bench,
        "MODEL: answer MT-Bench's questions; its folder: have the answers judged",
        options="MtBenchOptions",
        dry=False,
    ),
    "eval": Verb(stages.stages, "held-out text and benchmarks, several models side by side", ("eval", "data")),
    "trace": Verb(
        routing.trace, "what the routers do with each domain, of a run or of MODEL DATA", ("trace", "data"), dry=False
    ),
    "report": Verb(stages.stages, "write the run's report.html"),
    "run": Verb(stages.stages, "all of these into one run folder, finished stages kept", ("plan", "convert", "data")),
    "import": Verb(folders.import_, "a LLaMA-MoE checkpoint as a stock mixture", options="ImportOptions"),
    "densify": Verb(folders.densify, "lay the experts together again: a dense model", options="DensifyOptions"),
    "similarity": Verb(
        experts.similarity,
        "MODEL [OTHER ...]: how alike experts are, to each other, a dense model and an earlier checkpoint",
        dry=False,
    ),
    "prune-experts": Verb(
        experts.prune_experts, "a mixture without the experts that a trace saw least", options="PruneOptions"
    ),
    "reference-loss": Verb(
        mixing.reference_loss,
        "MODEL DATA: held-out losses by domain, for dynamic mixing rules",
        options="ReferenceOptions",
        dry=False,
    ),
    "show": Verb(
        show.show, "describe a run, a model, a plan (with a picture), a domain or a config", options="ShowOptions"
    ),
    "doctor": Verb(machine.doctor, "a paste-ready picture of the machine and the versions"),
    "demo": Verb(machine.demo, "the whole way on an embedded model and text, without network"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="prismoe --help")


def _parser() -> _Parser:
    parser = _Parser(prog="prismoe", add_help=False, allow_abbrev=False)
    parser.add_argument("verb", nargs="?")
    parser.add_argument("rest", nargs="*")
    for name in ("--dry-run", "--json", "--offline", "--force", "--no-verify", "--debug", "--help", "--version"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("-h", dest="help", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--for", dest="engines")
    parser.add_argument("--compare", nargs=2)
    parser.add_argument("--part")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--max-steps", type=int)
    return parser


SUBJECT = "[CONFIG.yaml | MODEL | RUN_FOLDER] [section.key=value ...] [options]"
OPTIONS = """\
options:
  --out DIR    the run folder (the config's `out`)
  --seed N     of everything that draws (the config's `seed`)
  --dry-run    check everything, estimate, write nothing
  --force      make again what was made with other settings
  --offline    open no socket
  --no-verify  read finished folders without hashing their files first
  --for A,B    choose a target that is right in these engines (`convert.engines`): transformers5, transformers4,
               vllm, sglang, gguf, mlx; widths: convert.pad_to=256 for K-quants of gguf, 128 x ranks for block FP8
  --compare A B  with plan: how far two plan files agree
  --part I/N   with prepare: only the I-th of N shares of the work, then once without it; a Slurm array of 64:
               sbatch --array=1-64 --wrap 'prismoe prepare CONFIG.yaml --part $SLURM_ARRAY_TASK_ID/64'
  --max-steps N  with pretrain, run or tune: train N steps at most in this command, saved; the same command continues
  --json       one JSON object on stdout, nothing else
  --debug      the traceback of an error
  --version    version
"""


def help_text(verb: str | None = None) -> str:
    """The page of `prismoe --help`, or of one verb with every config key that it reads."""
    if verb is None:
        rows = "\n".join(f"  {name:<14} {found.what}" for name, found in VERBS.items())
        return (
            "prismoe turns a dense checkpoint into a Mixture-of-Experts model in a standard architecture.\n\n"
            f"usage: prismoe VERB {SUBJECT}\n\n"
            f"verbs (prismoe VERB --help lists its config keys):\n{rows}\n\n{OPTIONS}\n"
            "exit codes: 2 usage or config, 3 bad input, 4 resources, 5 numerical, 75 interrupted, resumable"
        )
    found = VERBS[verb]
    page = f"prismoe {verb}: {found.what}\n\nusage: prismoe {verb} {SUBJECT}"
    if found.keys:
        from prismoe.config.keys import key_lines

        page += "\n\nconfig keys, in the YAML or as section.key=value:\n" + "\n".join(key_lines(found.keys))
    if found.options:
        from prismoe.config import options

        lines = options.option_lines(getattr(options, found.options))
        page += "\n\nits own, as key=value:\n" + "\n".join(lines)
    return f"{page}\n\n{OPTIONS}"


def _read(argv: Sequence[str]) -> argparse.Namespace:
    flags = _parser().parse_intermixed_args(argv)
    if flags.verb is not None and flags.verb not in VERBS:
        from difflib import get_close_matches

        near = get_close_matches(flags.verb, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "prismoe --help"
        raise UsageError(f"unknown verb {flags.verb!r}", needed=f"one of {', '.join(VERBS)}", hint=hint)
    if flags.compare is not None and flags.verb not in ("plan", None):
        raise UsageError(f"--compare with {flags.verb}", needed="prismoe plan --compare PLAN PLAN")
    if flags.dry_run and flags.verb is not None and not VERBS[flags.verb].dry:
        raise UsageError(f"--dry-run with {flags.verb}", needed="a verb with something to check before its work")
    if flags.part is not None and flags.verb not in ("prepare", None):
        raise UsageError(f"--part with {flags.verb}", needed="prismoe prepare CONFIG.yaml --part I/N")
    if flags.max_steps is not None and flags.verb not in ("pretrain", "run", "tune", None):
        raise UsageError(f"--max-steps with {flags.verb}", needed="prismoe pretrain, run or tune")
    return flags


def _job(flags: argparse.Namespace, screen: Screen) -> Job:
    subjects = [text for text in flags.rest if "=" not in text]
    if len(subjects) > 1 and flags.verb not in ("reference-loss", "similarity", "trace", "generate"):
        raise UsageError(f"{subjects[1]!r} after {subjects[0]!r}", needed="one config, model or run folder")
    overrides = tuple(text for text in flags.rest if "=" in text)
    return Job(flags.verb, subjects[0] if subjects else None, overrides, flags, screen, tuple(subjects[1:]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. SIGTERM stops it as Ctrl-C does."""
    with _terminable():
        return _main(sys.argv[1:] if argv is None else list(argv))


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):  # a terminal that cannot show ✓ shows ? instead of failing
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0
    debug, as_json = "--debug" in argv, "--json" in argv
    try:
        flags = _read(argv)
        if flags.version:
            from prismoe.folder import versions

            print(f"prismoe {versions().get('prismoe', '(not installed)')}")
            return 0
        if flags.help or flags.verb is None:
            print(help_text(flags.verb))
            return 0
        if flags.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"
        from prismoe.console import Screen
        from prismoe.folder import unchecked

        screen = Screen(json=as_json)
        job = _job(flags, screen)
        with unchecked() if flags.no_verify else nullcontext():
            screen.result({"verb": flags.verb, **VERBS[flags.verb].work(job)})
        return 0
    except BrokenPipeError:
        # The reader has gone (| head); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if debug or not (isinstance(error, Exception | KeyboardInterrupt) or _panic(error)):
            raise
        return _tell(_with_command(_for_people(error), argv), as_json=as_json)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is raised as KeyboardInterrupt, so that whatever is open is put in order."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can have handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _with_command(error: PrismoeError, argv: Sequence[str]) -> PrismoeError:
    """Where the same command continues, that command."""
    if not isinstance(error, InterruptedRun) or not error.hint.endswith(AGAIN) or "RANK" in os.environ:
        return error
    return InterruptedRun(error.found, where=error.where, hint=f"{error.hint}: {shlex.join(['prismoe', *argv])}")


AGAIN = "the same command continues"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
RESOURCES = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE, errno.ENFILE)


def _panic(error: BaseException) -> bool:
    """A failure below Python: no `Exception`, and of a class that every library makes for itself."""
    return type(error).__name__ == "PanicException"


def _for_people(error: BaseException) -> PrismoeError:
    """Every exception as the one line that it deserves."""
    if isinstance(error, PrismoeError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRun(f"stopped by {error or 'SIGINT'}", hint=AGAIN)
    from prismoe.room import exhausted, unwritten

    if isinstance(error, OSError) and error.errno in RESOURCES:
        if error.filename is None:
            return ResourceError(str(error.strerror))
        return unwritten(Path(os.fsdecode(error.filename)), error, what="not possible")
    if isinstance(error, MemoryError | OSError | RuntimeError) and (found := exhausted(error)):
        return found
    text = " ".join(str(error).split())[:300]
    if _panic(error):
        return InputError(f"failed below Python ({text})", where="a library", hint="is a tokenizer.json damaged?")
    return PrismoeError(f"{type(error).__name__}: {text}", where="internal error", hint="--debug shows where")


def _tell(error: PrismoeError, *, as_json: bool) -> int:
    from prismoe.console import Screen

    screen = Screen(json=as_json)
    screen.error(str(error))
    screen.result({"error": str(error), "exit_code": error.exit_code})
    return error.exit_code
