"""Numbers that cannot be, planted in weights, batches and gradients; experts that collapse or starve."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.torture.outcome import Outcome
from tests.torture.place import Place
from tests.torture.planted import EXPERTS, Planted, Result, in_tuning, result, train
from tests.torture.processes import command
from tests.torture.world import ready

SECONDS = 70
VALUES = ("nan", "inf", "-inf")
UP = "model.layers.2.mlp.up_proj.weight"
TENSORS = (
    *("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", UP),
    *("model.layers.0.input_layernorm.weight", "model.norm.weight", "lm_head.weight"),
)
READERS = ("convert", "calibrate", "pretrain", "tune")  # of every weight; `plan` reads what its method looks at
KINDS = ("NaN in a batch", "Inf in a batch", "NaN in a gradient", "Inf in a gradient", "gradient spike", "loss spike")
TRAINING = ("pretrain.max_epochs=1000", "pretrain.eval_every=0", "pretrain.eval_tokens=64", "pretrain.save_every=8")
AT = 18  # the first step that is damaged: a spike is one after 16 others
SOON = 50  # steps


def run(place: Place) -> Iterator[Outcome]:
    ready()
    for stage in ("plan", "convert", "prepare"):
        place.command(stage, str(place.config), "--out", str(place.folder / "before"))
    yield _weights(place)
    yield _skipped(place)
    yield _too_often(place)
    yield _tuned(place)
    yield _alarms(place)


@dataclass(frozen=True)
class Weight:
    """One number of a tensor, and the verb that reads it."""

    value: str
    tensor: str
    verb: str

    def __str__(self) -> str:
        return f"{self.value} in {self.tensor}, {self.verb}"


def _weights(place: Place) -> Outcome:
    assert place.tuning.is_file()
    cases = [Weight(value, name, verb) for value in VALUES for name in TENSORS for verb in READERS]
    cases += [Weight(value, UP, "plan") for value in VALUES]
    return Outcome.of(
        "NaN or infinity in one weight of the source: refused by the verb that reads it, naming the tensor",
        place.spread(cases, lambda case: _refused(place, case)),
        goal=len(VALUES) * (len(TENSORS) * len(READERS) + 1),
        note=f"{len(TENSORS)} tensors; plan, {', '.join(READERS)}",
    )


def _refused(place: Place, case: Weight) -> str | None:
    """What comes before the verb takes no harm from the number: a random plan, and text."""
    tuned, source, out = case.verb == "tune", Path("damaged").absolute(), Path("run").absolute()
    for folder in (source, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(place.folder / ("talk/mixture" if tuned else "inputs/dense"), source)
    words = [str(place.tuning if tuned else place.config), "--out", str(out), f"source={source}"]
    if not tuned:
        words += ["pretrain.model=dense", "plan.method=clustering" if case.verb == "plan" else "plan.method=random"]
        words += ["calibrate.max_tokens=200", "calibrate.seq_len=16"] if case.verb == "calibrate" else []
    name = _plant(source / "model.safetensors", case.tensor, float(case.value))
    if before := {"convert": "plan", "calibrate": "prepare", "pretrain": "prepare"}.get(case.verb):
        done = command([before, *words], log=Path("log"))
        assert done.code == 0, done.error[-600:]
    there = {path for path in out.rglob("*") if path.suffix in (".safetensors", ".npy")}
    done = command([case.verb, *words], log=Path("log"))
    if done.code not in (3, 5) or name not in done.last_line:
        return f"exit {done.code}, {done.last_line[:200]}"
    left = {path for path in out.rglob("*") if path.suffix in (".safetensors", ".npy")} - there
    return f"left {sorted(map(str, left))[:2]}" if left else None


def _plant(path: Path, name: str, value: float) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    # The mixture has experts for a feed-forward, and its head is its embedding.
    names = {UP: "model.layers.1.block_sparse_moe.experts.2.w3.weight", "lm_head.weight": "model.embed_tokens.weight"}
    name = name if name in tensors else names[name]
    tensors[name].view(-1)[tensors[name].numel() * 2 // 3] = value
    save_file(tensors, path, {"format": "pt"})
    return name


def _trained(place: Place, runs: Sequence[Planted]) -> Iterator[tuple[Planted, Result | str]]:
    """What came of each run that there was time for; what to say where its processes did not end alike."""

    def one(run: Planted) -> str | None:
        return train(run, place.fresh(run.name, place.folder / "before"))

    found = place.spread(runs, one)
    for run in runs:
        if run.name in found:
            yield run, found[run.name] or result(place.folder / run.name)


def _planted(place: Place, name: str, world: int, faults: Mapping[int, tuple[str, ...]], *more: str) -> Planted:
    words, again = (str(place.config),), name.endswith("for-ever")
    return Planted(name, world, faults, (*TRAINING, *more), again=again, words=words)


def _skipped(place: Place) -> Outcome:
    """All kinds in one run, each in a step of its own: what is left out changes nothing for those after it."""
    faults = {AT + 2 * number: (kind,) for number, kind in enumerate(KINDS)}
    steps = max(faults) + 2
    runs = [
        _planted(
            place, f"{precision}-{world}", world, faults, f"pretrain.steps={steps}", f"pretrain.precision={precision}"
        )
        for world in (2, 1)
        for precision in ("fp32", "bf16")
    ]
    cases: dict[str, str | None] = {}
    for run, found in _trained(place, runs):
        for step, (kind,) in faults.items():
            name = f"{kind}, {run.name.replace('-', ', ')} processes"
            cases[name] = found if isinstance(found, str) else found.weights_wrong
            if isinstance(found, str) or cases[name]:
                continue
            skipped = {line["step"]: line["found"] for line in found.events("skipped")}
            if found.code != 0:
                cases[name] = found.ended
            elif step not in skipped or len(skipped) != len(faults):
                cases[name] = f"left out: {sorted(skipped)}"
            elif found.receipt["skipped"] != len(faults):
                cases[name] = f"{found.receipt['skipped']} in the receipt"
            elif not skipped[step].startswith(("loss is", "gradient norm")):
                cases[name] = f"logged: {skipped[step]}"
    return Outcome.of(
        "NaN or infinity in a batch or a gradient of one process, a spike of gradient or loss: "
        "the step is left out and logged, the weights stay finite",
        cases,
        goal=24,
        note="fp32 and bf16, 1 and 2 processes",
    )


def _too_often(place: Place) -> Outcome:
    runs = []
    for world, kinds in ((2, (KINDS[1], KINDS[2])), (1, KINDS)):
        for kind in kinds:
            name = f"{world}-{kind.replace(' ', '-')}"
            for when, until in (("three-times", 3), ("for-ever", 1000)):
                faults = {AT + number: (kind,) for number in range(until)}
                runs.append(_planted(place, f"{name}-{when}", world, faults, f"pretrain.steps={AT + 4}"))
    cases: dict[str, str | None] = {}
    for run, found in _trained(place, runs):
        cases[run.name] = found if isinstance(found, str) else found.weights_wrong or _gave_up(found, run.again)
    return Outcome.of(
        "three such steps in a row: back to the last checkpoint and on with other text; for ever: exit 5 after going "
        "back twice, and without the fault the same command ends the run",
        cases,
        goal=16,
    )


def _gave_up(found: Result, ever: bool) -> str | None:
    back = [(line["step"], line["to"]) for line in found.events("rollback")]
    expected = [(AT + 2, 16), (16 + 3, 16)][: 2 if ever else 1]
    if back != expected:
        return f"{found.ended}, went back {back}"
    if not ever:
        went = found.code == 0 and found.receipt["went_back"] == 1 and found.events("step")[-1]["step"] == AT + 4
        return None if went else found.ended
    if found.code != 5 or "it went back 2 times" not in found.error:
        return found.ended
    return None if found.again == 0 else f"then {found.again}"


def _tuned(place: Place) -> Outcome:
    found = place.spread(
        ("nan in a gradient", "inf in a gradient", "nan in the loss"), lambda case: _stopped(place, case)
    )
    return Outcome.of(
        "NaN or infinity in a gradient or the loss of tune: exit 5 before it reaches a weight, and without the fault "
        "the same command ends the run",
        found,
        goal=3,
    )


def _stopped(place: Place, case: str) -> str | None:
    out, log = Path("tuned").absolute(), Path("log")
    shutil.rmtree(out, ignore_errors=True)
    words = ["tune", str(place.tuning), "--out", str(out), "tune.save_every=1"]
    value, *_, where = case.split()
    done = command(words, log=log, before=partial(in_tuning, float(value), where, 3))
    if done.code != 5 or "step 3:" not in done.last_line or (out / "model").exists():
        return f"exit {done.code}, {done.last_line[:300]}"
    again = command(words, log=log)
    return None if again.code == 0 else f"then exit {again.code}, {again.last_line[:300]}"


def _alarms(place: Place) -> Outcome:
    """Three kinds in one run, each in a layer of its own."""
    kinds, begins = tuple(EXPERTS), (2, 14, 26)  # looks are after 25, 50 and 75 steps: the worst is just after one
    runs = [
        _planted(
            place, f"{world}-from-{at}", world, dict.fromkeys(range(at, 1000), kinds), f"pretrain.steps={at + SOON}"
        )
        for at in begins
        for world in (2, 1)
    ]
    cases: dict[str, str | None] = {}
    latest = 0
    for run, found in _trained(place, runs):
        at = min(run.faults)
        for kind, (layer, biases) in EXPERTS.items():
            name = f"{kind} from step {at}, {run.world} processes"
            if isinstance(found, str) or found.code != 0:
                cases[name] = found if isinstance(found, str) else found.ended
                continue
            key = "starved" if kind == "starved" else "dominant"
            wanted = {(layer, expert) for expert in biases}
            raised = [
                line for line in found.events("alarm") if wanted <= {(o["layer"], o["expert"]) for o in line[key]}
            ]
            after = raised[0]["step"] - at if raised else 999
            told = any(warning.startswith(f"{key} since step") for warning in found.receipt["warnings"])
            latest = max(latest, after)
            cases[name] = None if 0 <= after <= SOON and told else f"after {after} steps, told: {told}"
    return Outcome.of(
        f"a router that sends every token to the same experts, to one, or none to one: an alarm within {SOON} steps "
        "names layer and expert, in the log and in the receipt",
        cases,
        goal=18,
        note=f"the latest after {latest} steps",
    )
