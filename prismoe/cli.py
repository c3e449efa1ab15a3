"""The command line: one table of verbs. Results on stdout, progress and errors on stderr, exit codes from errors.py."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prismoe.errors import InterruptedRun, PrismoeError, ResourceError, UsageError

if TYPE_CHECKING:
    from prismoe.config import Config
    from prismoe.console import Screen

__all__ = ["main"]


@dataclass(frozen=True)
class Job:
    """One command: what was typed, and the screen to show it on."""

    verb: str
    subject: str | None
    overrides: tuple[str, ...]
    flags: argparse.Namespace
    screen: Screen

    def config(self) -> Config:
        """What the subject and the overrides describe: a YAML file, a run folder, or a model as `source`."""
        from prismoe.config import load_config

        overrides = self.overrides
        if self.flags.engines is not None:
            overrides = (*overrides, f"convert.engines={self.flags.engines}")
        fixed = {key: getattr(self.flags, key) for key in ("out", "seed") if getattr(self.flags, key) is not None}
        if self.subject is None:
            return load_config(overrides=overrides, **fixed)
        if self.subject.endswith((".yaml", ".yml")):
            return load_config(self.subject, overrides=overrides, **fixed)
        if (Path(self.subject) / "run.yaml").is_file():
            fixed.setdefault("out", self.subject)
            return load_config(Path(self.subject) / "run.yaml", overrides=overrides, **fixed)
        return load_config(overrides=overrides, source=self.subject, **fixed)


def _stages(job: Job) -> dict[str, Any]:
    """A verb that is one stage of a run, or all of them."""
    from prismoe import views
    from prismoe.run import Done, run

    config = job.config()
    several = job.verb == "run"

    def show(done: Done) -> None:
        if several:
            job.screen.stage(done.stage, done.state, views.summary(done.stage, done.receipt), done.seconds)
        elif done.stage == job.verb:
            views.view(job.screen, done.stage, done.receipt)
        for warning in done.receipt.get("warnings", ()) if several or done.stage == job.verb else ():
            job.screen.warning(f"{done.stage}: {warning}")

    with job.screen.progress() as on_progress:
        result = run(
            config,
            stages=None if several else (job.verb,),
            dry_run=job.flags.dry_run,
            force=job.flags.force,
            offline=job.flags.offline,
            on_progress=on_progress,
            on_stage=show,
        )
    if several and not job.flags.dry_run and result.stages[-1].stage != "report":
        job.screen.warning("report: not written, jinja2 or matplotlib is missing: pip install 'prismoe[report]'")
    if several and "eval" in (receipts := {done.stage: done.receipt for done in result.stages}):
        views.view(job.screen, "eval", receipts["eval"])
    if not result.stages:
        job.screen.note(f"{job.verb}: the config is right; there is nothing else to check before the work itself")
    return result.to_dict() if several or not result.stages else result.of(job.verb)


def _verify(job: Job) -> dict[str, Any]:
    """A run's mixture, or any folder that `convert` wrote."""
    from prismoe import views
    from prismoe.folder import Manifest

    manifest = Manifest.read(Path(job.subject)) if job.subject and Path(job.subject).is_dir() else None
    if job.subject is None or manifest is None or manifest.kind != "convert":
        return _stages(job)
    from prismoe.config import load_config
    from prismoe.verify import verify

    config = load_config(overrides=job.overrides)
    with job.screen.progress() as on_progress:
        certificate = verify(
            job.subject,
            source=config.source,
            tokens=config.verify.tokens,
            force=job.flags.force,
            offline=job.flags.offline,
            on_progress=on_progress,
        ).to_dict()
    views.view(job.screen, "verify", certificate)
    return certificate


def _plan(job: Job) -> dict[str, Any]:
    """Make a plan, or hold two against each other."""
    if job.flags.compare is None:
        return _stages(job)
    from prismoe.plan.compare import compare_plans
    from prismoe.show import show_comparison

    found = compare_plans(*job.flags.compare).to_dict()
    show_comparison(job.screen, found)
    return found


def _show(job: Job) -> dict[str, Any]:
    from prismoe.show import describe, show

    if job.subject is None:
        raise UsageError("nothing to show", needed="a run folder, a model, a plan, a domain or a config")
    found: dict[str, Any] = describe(job.subject, offline=job.flags.offline)
    show(job.screen, found)
    return found


def _densify(job: Job) -> dict[str, Any]:
    from prismoe import views
    from prismoe.config.options import DensifyOptions, read_options
    from prismoe.densify import densify

    options = read_options(DensifyOptions, job.overrides)
    source, out = _source_and_out(job, "a folder with experts")
    with job.screen.progress() as on_progress:
        receipt = densify(
            source,
            out=out,
            plan=options.plan,
            scale=options.scale,
            max_shard_bytes=options.max_shard_bytes,
            offline=job.flags.offline,
            force=job.flags.force,
            dry_run=job.flags.dry_run,
            on_progress=on_progress,
        ).to_dict()
    views.view(job.screen, "densify", receipt)
    for warning in receipt["warnings"]:
        job.screen.warning(warning)
    return receipt


def _import(job: Job) -> dict[str, Any]:
    from dataclasses import asdict

    from prismoe import views
    from prismoe.config.options import ImportOptions, read_options
    from prismoe.importing import import_checkpoint

    options = asdict(read_options(ImportOptions, job.overrides))
    domains = options.pop("domains")
    source, out = _source_and_out(job, "a checkpoint of model_type llama_moe")
    with job.screen.progress() as on_progress:
        receipt = import_checkpoint(
            source,
            out=out,
            domains=[domains] if isinstance(domains, str) and domains else domains,
            seed=job.flags.seed or 0,
            offline=job.flags.offline,
            force=job.flags.force,
            dry_run=job.flags.dry_run,
            on_progress=on_progress,
            **options,
        ).to_dict()
    views.view(job.screen, "import", receipt)
    return receipt


def _source_and_out(job: Job, what: str) -> tuple[str, str]:
    if job.subject is None:
        raise UsageError("nothing to read", where=job.verb, needed=what)
    if job.flags.out is None:
        raise UsageError("out is not set", where=job.verb, needed="--out FOLDER")
    return job.subject, job.flags.out


def _doctor(job: Job) -> dict[str, Any]:
    from prismoe.doctor import doctor

    picture = doctor()
    for name, facts in picture.sections.items():
        job.screen.title(name)
        job.screen.pairs(facts)
    for warning in picture.warnings:
        job.screen.warning(warning)
    return picture.to_dict()


def _demo(job: Job) -> dict[str, Any]:
    from prismoe.demo import demo

    out, seed = job.flags.out or "runs/demo", job.flags.seed
    overrides = job.overrides if seed is None else (*job.overrides, f"seed={seed}")
    return demo(job.screen, out=out, overrides=overrides, dry_run=job.flags.dry_run, force=job.flags.force)


@dataclass(frozen=True)
class Verb:
    """`keys` are the config sections that the verb reads, `options` a dataclass of its own ones, for its help."""

    work: Callable[[Job], dict[str, Any]]
    what: str
    keys: tuple[str, ...] = ()
    options: str = ""


VERBS: dict[str, Verb] = {
    "plan": Verb(_plan, "decide which neurons become which expert, and what would come out", ("plan", "convert")),
    "convert": Verb(_stages, "write the mixture as a stock Hugging Face folder", ("plan", "convert")),
    "verify": Verb(_verify, "prove that the mixture is the dense model, cut as planned", ("verify",)),
    "prepare": Verb(_stages, "turn the text of each domain into tokens", ("data",)),
    "calibrate": Verb(_stages, "measure on text what a plan looks at", ("calibrate", "plan", "data")),
    "pretrain": Verb(_stages, "train the mixture on the weighted domains", ("pretrain", "data")),
    "eval": Verb(_stages, "perplexity and bits per byte: dense, step 0, trained", ("eval", "data")),
    "report": Verb(_stages, "write the run's report.html"),
    "run": Verb(_stages, "all of the above into one run folder, finished stages kept", ("plan", "convert", "data")),
    "import": Verb(_import, "a LLaMA-MoE checkpoint as a stock mixture, its routers fitted", options="ImportOptions"),
    "densify": Verb(_densify, "lay the experts of a mixture together again: a dense model", options="DensifyOptions"),
    "show": Verb(_show, "describe a run, a model, a plan, a domain or a config"),
    "doctor": Verb(_doctor, "a paste-ready picture of the machine and the versions"),
    "demo": Verb(_demo, "the whole way on an embedded model and text, without network"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint="prismoe --help")


def _parser() -> _Parser:
    parser = _Parser(prog="prismoe", add_help=False, allow_abbrev=False)
    parser.add_argument("verb", nargs="?")
    parser.add_argument("rest", nargs="*")
    for name in ("--dry-run", "--json", "--offline", "--force", "--debug", "--help", "--version"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("-h", dest="help", action="store_true")
    parser.add_argument("--out")
    parser.add_argument("--for", dest="engines")
    parser.add_argument("--compare", nargs=2)
    parser.add_argument("--seed", type=int)
    return parser


SUBJECT = "[CONFIG.yaml | MODEL | RUN_FOLDER] [section.key=value ...] [options]"
OPTIONS = """\
options:
  --out DIR    the run folder (the config's `out`)
  --seed N     of everything that draws (the config's `seed`)
  --dry-run    check everything, estimate, write nothing
  --force      make again what was made with other settings
  --offline    open no socket
  --for A,B    choose a target that is right in these engines (`convert.engines`): transformers5, transformers4,
               vllm, sglang, gguf, mlx
  --compare A B  with plan: how far two plan files agree
  --json       one JSON object on stdout, nothing else
  --debug      the traceback of an error
  --version    version
"""


def help_text(verb: str | None = None) -> str:
    """The page of `prismoe --help`, or of one verb with every config key that it reads."""
    if verb is None:
        rows = "\n".join(f"  {name:<10} {found.what}" for name, found in VERBS.items())
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
    return flags


def _job(flags: argparse.Namespace, screen: Screen) -> Job:
    subjects = [text for text in flags.rest if "=" not in text]
    if len(subjects) > 1:
        raise UsageError(f"{subjects[1]!r} after {subjects[0]!r}", needed="one config, model or run folder")
    overrides = tuple(text for text in flags.rest if "=" in text)
    return Job(flags.verb, subjects[0] if subjects else None, overrides, flags, screen)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
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

        screen = Screen(json=as_json)
        job = _job(flags, screen)
        screen.result({"verb": flags.verb, **VERBS[flags.verb].work(job)})
        return 0
    except BrokenPipeError:
        # The reader has gone (| head); Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            raise
        return _tell(_for_people(error), as_json=as_json)


RESOURCES = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _for_people(error: BaseException) -> PrismoeError:
    """Every exception as the one line that it deserves."""
    if isinstance(error, PrismoeError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRun("interrupted", hint="the same command continues")
    if isinstance(error, MemoryError):
        return ResourceError("out of memory", hint="prismoe VERB --dry-run estimates what is needed")
    if isinstance(error, OSError) and error.errno in RESOURCES:
        return ResourceError(str(error.strerror), where=str(error.filename or ""))
    text = " ".join(str(error).split())[:300]
    return PrismoeError(f"{type(error).__name__}: {text}", where="internal error", hint="--debug shows where")


def _tell(error: PrismoeError, *, as_json: bool) -> int:
    from prismoe.console import Screen

    screen = Screen(json=as_json)
    screen.error(str(error))
    screen.result({"error": str(error), "exit_code": error.exit_code})
    return error.exit_code
