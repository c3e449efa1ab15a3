"""`run`: the whole way from one config into one run folder, stage by stage, finished stages left alone.

A stage is finished when `run.json` holds its key (a hash over everything that decides its result, the keys of the
stages before it included) and its output is there. What a stage does is in stages.py; here is only the order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prismoe.errors import InputError, UsageError
from prismoe.folder import MARKER, claim, make_folder, write_atomic, write_json_atomic, write_mark
from prismoe.progress import Progress, quiet
from prismoe.room import require_room, unwritten
from prismoe.run.stages import STAGES, Work
from prismoe.state import CONFIG, STATE, read_state

if TYPE_CHECKING:
    from prismoe.config import Config

__all__ = ["STAGES", "Done", "Run", "run", "run_folder"]

SMALLEST = 1 << 20  # bytes that a run folder takes at least, with what it says of itself after every stage


@dataclass(frozen=True)
class Done:
    """One stage of a run: `state` is "made", "kept" (it was finished before) or "checked" (a dry run)."""

    stage: str
    state: str
    seconds: float
    receipt: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Receipt of `run`: the folder and its stages in order."""

    out: str
    stages: tuple[Done, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def of(self, stage: str) -> dict[str, Any]:
        """The receipt of a stage that took part."""
        return next(done.receipt for done in self.stages if done.stage == stage)


def run(
    config: Config,
    *,
    stages: Sequence[str] | None = None,
    dry_run: bool = False,
    force: bool = False,
    offline: bool = False,
    on_progress: Progress = quiet,
    on_stage: Callable[[Done], None] = lambda done: None,
) -> Run:
    """Bring the run folder `config.out` up to date.

    Args:
        config: see `load_config`.
        stages: some of `STAGES` instead of all that the config has a section for (and the report where its packages
            are installed); what comes before them must be finished, except the plan of a conversion.
        dry_run: check everything that can be checked, write nothing.
        force: make stages again whose settings changed, over their old output.
        on_stage: called after each stage.

    Raises:
        UsageError: a section is missing, or finished output was made with other settings.
        InputError: a stage before the wanted ones is not finished.
        PrismoeError: whatever a stage raises; the stages before it stay finished.
    """
    names = [name for name in _order(config) if (name in stages if stages is not None else _wanted(config, name))]
    if "convert" in names and "plan" not in names:
        names.insert(0, "plan")
    for name in names:
        for key in STAGES[name].needs:
            config.need(key)
        if not STAGES[name].asked(config):
            found, needed = STAGES[name].nothing
            raise UsageError(found, needed=needed)
    if stages is None and "plan" in names:
        _check_statistics(config)
    if dry_run:
        names = [name for name in names if _checkable(config, name) or names in (["pretrain"], ["eval"])]
    elif names != ["plan"]:
        config.need("out")
    from prismoe.train.engine.layout import launched  # its package loads torch

    rank, world = launched()[:2]
    if world > 1 and names != ["pretrain"]:
        raise UsageError(f"{', '.join(names)} in {world} processes", needed="`prismoe pretrain` alone under torchrun")
    work = Work(config, dry_run=dry_run, force=force, offline=offline, on_progress=on_progress)
    writes = work.out is not None and not dry_run and rank == 0
    done: list[Done] = []
    keys = _keys(work)
    if writes:
        before = read_state(work.folder("."))
        for name in names:
            if not _finished(work, name, _late_key(name, keys, before), before):
                STAGES[name].check(work)
        require_room(work.folder("."), disk_bytes=SMALLEST)
    with _hold(work.out) if work.out is not None and writes else nullcontext():
        state = read_state(work.out) if work.out is not None else {}
        if writes:
            _check_before(work, names, keys, state)
            write_atomic(work.folder(CONFIG), _yaml(config))
        for name in names:
            started, stage = time.monotonic(), STAGES[name]
            key = _late_key(name, keys, state)
            # By name: a report is written again, perhaps by a newer version; prepare checks every shard that it has.
            asked = stages is not None and name in ("report", "prepare")
            if not asked and _finished(work, name, key, state):
                done.append(Done(name, "kept", 0.0, state[name]["receipt"]))
            else:
                receipt = json.loads(json.dumps(stage.work(work)))  # as a kept stage has it
                seconds = round(time.monotonic() - started, 3)
                found = "kept" if _nothing_new(receipt) else "made"
                done.append(Done(name, "checked" if dry_run else found, seconds, receipt))
                if writes:
                    state[name] = {
                        "key": key,
                        "settings": dict(stage.decides(config)),
                        "seconds": seconds,
                        "receipt": receipt,
                    }
                    write_json_atomic(work.folder(STATE), state)
            on_stage(done[-1])
    return Run(out=config.out or "", stages=tuple(done))


def _check_statistics(config: Config) -> None:
    """A run makes the calibration that its plan looks at; one without a calibrate section has to name another's."""
    from prismoe.config.keys import wanted_statistics

    if config.calibrate is not None or config.plan.calibration is not None or not wanted_statistics(config.plan):
        return
    text = "" if config.data is not None else " and a `data:` section"
    raise UsageError(
        "the plan needs statistics of the neurons",
        where=config.place(""),
        needed="plan.calibration, a folder that `prismoe calibrate` made, or one of this run",
        hint=f"add `calibrate: {{}}`{text} to the config",
    )


def _finished(work: Work, name: str, key: str, state: Mapping[str, Any]) -> bool:
    there = work.out is not None and (work.out / STAGES[name].output).exists()
    return there and name in state and state[name]["key"] == key


def _order(config: Config) -> list[str]:
    """What is soon done and often wrong comes first: a plan does not wait for text that it does not look at."""
    soon = () if config.calibrate is not None else ("plan", "convert", "verify")
    return sorted(STAGES, key=lambda name: name not in soon)


def _checkable(config: Config, name: str) -> bool:
    """Whether a dry run can say anything: not before the text of a calibration is prepared, or a plan is measured."""
    if name == "eval":
        return bool(config.eval.benchmarks)
    if config.calibrate is None or not STAGES[name].dry:
        return STAGES[name].dry
    out = Path(config.need("out"))
    measured = config.plan.calibration is not None or (out / STAGES["calibrate"].output).exists()
    return {"sift": True, "prepare": True, "calibrate": (out / STAGES["prepare"].output).exists()}.get(name, measured)


def run_folder(out: Path) -> None:
    """Mark `out` as a run's folder where it is new, or holds nothing that a stage would write."""
    try:
        make_folder(out)
    except OSError as error:
        raise unwritten(out, error, what="cannot make the output folder") from error
    ours = {stage.output.split("/")[0] for stage in STAGES.values()} | {STATE}
    if not (out / MARKER).exists() and not any((out / name).exists() for name in ours):
        write_mark(out, "run", "run")


def _builds_on(name: str, config: Config) -> tuple[str, ...]:
    """`after` of a stage, as this config has it: training may begin with the mixture, its plan or the dense model."""
    after = STAGES[name].after
    if name != "pretrain" or config.pretrain is None or config.pretrain.model == "moe":
        return after
    others = tuple(other for other in after if other not in ("convert", "recover"))
    return ("plan", *others) if config.pretrain.model == "online" else others


@contextmanager
def _hold(out: Path) -> Iterator[None]:
    """Hold the run folder. What else a person keeps there is left alone: the stages claim their own folders in it."""
    run_folder(out)
    with claim(out, kind="run", key="run"):
        yield


def _wanted(config: Config, name: str) -> bool:
    if name == "report":  # needs an extra; without it a run is complete all the same
        from prismoe.report import can_report

        return can_report()
    return _has_sections(config, name)


def _has_sections(config: Config, name: str) -> bool:
    if config.pretrain is not None and name in {
        "dense": ("plan", "convert", "verify", "recover", "trace"),
        "online": ("convert", "verify", "recover"),
    }.get(config.pretrain.model, ()):
        return False
    stage = STAGES[name]
    return (stage.needs[0] == "source" or getattr(config, stage.needs[0]) is not None) and stage.asked(config)


def _keys(work: Work) -> dict[str, str]:
    """A hash for every stage that the config has the sections for."""
    keys: dict[str, str] = {}
    for name, stage in STAGES.items():
        if all(key == "source" or getattr(work.config, key) is not None for key in stage.needs) and stage.asked(
            work.config
        ):
            after = [keys[before] for before in _builds_on(name, work.config) if before in keys]
            parts = [work.checkpoint.fingerprint, dict(stage.decides(work.config)), after]
            keys[name] = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return keys


def _nothing_new(receipt: Mapping[str, Any]) -> bool:
    """Whether `prepare` found every domain finished: it was called to check them."""
    statuses = {domain.get("status") for domain in receipt.get("domains", ()) if isinstance(domain, dict)}
    return statuses == {"kept"}


def _late_key(name: str, keys: Mapping[str, str], state: Mapping[str, Any]) -> str:
    """Scores and report show what is there, so their keys also depend on what is there by now."""
    if name not in ("eval", "trace", "report"):
        return keys[name]
    there = {other: record["key"] for other, record in state.items() if other in ("convert", "recover", "pretrain")}
    there |= {other: record["key"] for other, record in state.items() if name == "report" and other != "report"}
    return hashlib.sha256(json.dumps([keys[name], there], sort_keys=True).encode()).hexdigest()


def _check_before(work: Work, names: Sequence[str], keys: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Before the first byte: nothing finished is overwritten by accident, and what a stage builds on is there."""
    for name in names:
        record = state.get(name)
        # prepare adds further files to what it has, and refuses anything else itself.
        kept = name in ("convert", "calibrate", "recover", "pretrain") or (name == "plan" and "convert" in state)
        if record and kept and record["key"] != keys[name] and not work.force:
            raise UsageError(
                f"{name} is finished with other settings{_difference(record['settings'], name, work.config)}",
                where=str(work.folder(STAGES[name].output).parent if name != "plan" else work.folder(STATE)),
                hint="--force makes it again, --out makes another run",
            )
        for before in (other for other in _builds_on(name, work.config) if other in keys):
            record = state.get(before)
            if before not in names and (record is None or record["key"] != keys[before]):
                found = "is not finished" if record is None else "was made with other settings"
                raise InputError(
                    f"{before} {found}", where=str(work.out), hint=f"`prismoe {before}` first, or `prismoe run`"
                )


def _difference(before: Mapping[str, Any], name: str, config: Config) -> str:
    """The first setting of a stage that differs, for the message."""
    now = json.loads(json.dumps(dict(STAGES[name].decides(config))))
    for section, value in now.items():
        old = before.get(section)
        if isinstance(value, dict) and isinstance(old, dict):
            for key in sorted({**value, **old}):
                if value.get(key) != old.get(key):
                    return f" ({section}.{key} was {old.get(key)!r}, is {value.get(key)!r})"
        if value != old:
            return f" ({section} was {old!r}, is {value!r})"
    return " (an earlier stage or the source changed)"


def _yaml(config: Config) -> bytes:
    import yaml

    if config.pretrain is not None:  # where one command stopped describes no run
        config = replace(config, pretrain=replace(config.pretrain, max_steps=0))
    head = "# Written by prismoe: the whole configuration of this run, defaults included.\n"
    return (head + yaml.safe_dump(config.to_dict(), sort_keys=False)).encode()
