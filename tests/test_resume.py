"""A stopped run goes on by the same command and ends with the bytes of one that never stopped."""

import atexit
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

from prismoe.errors import InputError, InterruptedRun, ResourceError
from prismoe.folder import Manifest
from prismoe.train.metrics import MetricsLog, read_metrics
from prismoe.train.pretrain import PretrainConfig, pretrain
from prismoe.train.recorded import as_recorded
from tests.training import domain_folder, tiny_moe

CONFIG = PretrainConfig(
    steps=12,
    seq_len=32,
    batch_size=6,
    micro_batch_size=3,
    warmup_steps=3,
    lr=1e-3,
    eval_every=4,
    save_every=5,
    keep=2,
    max_epochs=50.0,
    threads=1,
)


@cache
def made():
    """A mixture, two domains, and what a run over them leaves that never stopped; once per test process."""
    folder = Path(tempfile.mkdtemp(prefix="prismoe-unstopped-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = tiny_moe(folder / "moe")
    domains = [domain_folder(folder / name, tokenizer=source / "tokenizer.json", seed=i) for i, name in enumerate("ab")]
    pretrain(source, CONFIG, domains=domains, out=folder / "out")
    return source, domains, contents(folder / "out")


@pytest.fixture
def source():
    return made()[0]


@pytest.fixture
def domains():
    return made()[1]


@pytest.fixture
def unstopped():
    return made()[2]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if timeless(path)}


def timeless(path: Path) -> bool:
    """The clock is kept apart from everything whose bytes are promised."""
    return path.is_file() and path.name != "timing.jsonl" and "tensorboard" not in path.parts


class SignalAt:
    """A progress function that sends this process a real signal when some work reports some count."""

    def __init__(self, number, what, done):
        self.number, self.what, self.done, self.sent = number, what, done, False

    def __call__(self, what, done, total):
        if not self.sent and what.startswith(self.what) and done == self.done:
            self.sent = True
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(
    ("number", "what", "done", "stopped_after"),
    [
        (signal.SIGTERM, "train step", 1, 1),
        (signal.SIGINT, "train step", 7, 7),
        (signal.SIGTERM, "train step", 8, 8),  # an evaluation is due next: it belongs to the resumed run
        (signal.SIGTERM, "train step", 10, 10),  # a checkpoint is due anyway
        (signal.SIGINT, "train step", 12, 12),  # all steps done, nothing written yet
    ],
)
def test_stopped_by_a_signal(tmp_path, source, domains, unstopped, number, what, done, stopped_after):
    out = tmp_path / "out"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(InterruptedRun) as caught:
        pretrain(source, CONFIG, domains=domains, out=out, on_progress=SignalAt(number, what, done))
    assert caught.value.exit_code == 75
    assert f"stopped by {number.name} after step {stopped_after} of 12" in str(caught.value)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert not (out / "model").exists()
    trained = pretrain(source, CONFIG, domains=domains, out=out)
    assert trained.resumed_from == stopped_after
    assert contents(out) == unstopped


def test_stopped_within_an_evaluation(tmp_path, source, domains, unstopped):
    out = tmp_path / "out"
    seen = []

    def progress(what, done, total):
        seen.append(what)
        if what == "held-out loss: b" and seen.count(what) == 2:  # the one after step 4
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRun, match="after step 4 of 12"):
        pretrain(source, CONFIG, domains=domains, out=out, on_progress=progress)
    assert read_metrics(out / "metrics.jsonl")[-1]["event"] == "step"
    assert pretrain(source, CONFIG, domains=domains, out=out).resumed_from == 4
    assert contents(out) == unstopped


def test_stopped_before_the_first_step(tmp_path, source, domains, unstopped):
    with pytest.raises(InterruptedRun, match="after step 0 of 12"):
        pretrain(
            source,
            CONFIG,
            domains=domains,
            out=tmp_path / "out",
            on_progress=SignalAt(signal.SIGINT, "held-out loss: a", 0),
        )
    assert pretrain(source, CONFIG, domains=domains, out=tmp_path / "out").resumed_from == 0
    assert contents(tmp_path / "out") == unstopped


def test_a_signal_while_the_model_is_written_waits_for_its_end(tmp_path, source, domains, unstopped, monkeypatch):
    out, rename, sent = tmp_path / "out", Path.rename, []

    def renaming(path, target):
        if not sent and "model" in Path(target).parent.name:
            sent.append(target)
            os.kill(os.getpid(), signal.SIGTERM)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renaming)
    with pytest.raises(InterruptedRun, match="the model is written"):
        pretrain(source, CONFIG, domains=domains, out=out)
    assert sent
    assert contents(out) == unstopped
    assert pretrain(source, CONFIG, domains=domains, out=out).seconds is None
    assert contents(out) == unstopped


def test_stopped_three_times(tmp_path, source, domains, unstopped):
    out = tmp_path / "out"
    for done in (2, 5, 9):
        with pytest.raises(InterruptedRun):
            pretrain(source, CONFIG, domains=domains, out=out, on_progress=SignalAt(signal.SIGTERM, "train step", done))
        kept = sorted(path.name for path in (out / "checkpoints").iterdir())
        assert len(kept) <= CONFIG.keep
        assert kept[-1] == f"step-{done:08d}"
    pretrain(source, CONFIG, domains=domains, out=out)
    assert contents(out) == unstopped


KILLED = """
import os, signal, sys
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
from prismoe.train.pretrain import pretrain
from tests.test_resume import CONFIG
source, folder, first, second, *points = sys.argv[1:]
real, left = os.fsync, 0
def counted(handle):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(handle)
os.fsync = counted
for point in points:  # a process each, of one that has imported everything
    left = int(point)
    child = os.fork()
    if child == 0:
        pretrain(source, CONFIG, domains=[first, second], out=f"{folder}/{point}")
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
POINTS = (3, 8, 14, 22)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs that were killed at these fsyncs, by their number."""
    folder, (source, domains, _) = tmp_path_factory.mktemp("killed"), made()
    words = [sys.executable, "-c", KILLED, *map(str, (source, folder, *domains, *POINTS))]
    done = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(POINTS), done.stderr
    return folder


@pytest.mark.parametrize("at", POINTS)
def test_killed_at_a_sync(source, domains, unstopped, killed, at):
    """kill -9 at several fsyncs (marker, checkpoint state, its manifest, log, model files, manifests)."""
    out = killed / str(at)
    assert Manifest.read(out) is None
    pretrain(source, CONFIG, domains=domains, out=out)
    assert contents(out) == unstopped


def test_a_setting_that_a_later_version_added_is_no_change_while_it_has_its_default(tmp_path):
    begun = {"pretrain": {"lr": 1e-3, "steps": 5}, "weights": {"a": 1.0}, "parents": {}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(begun))

    def now(**later):
        return {**begun, "pretrain": {**begun["pretrain"], **later}}

    assert as_recorded(path, now(spike=50.0, betas=(0.9, 0.95))) == begun
    for other in (now(spike=10.0), now(lr=2e-3, spike=50.0), {**now(), "parents": {"source": "x"}}):
        assert as_recorded(path, other) == other
    assert as_recorded(tmp_path / "absent", now()) == now()


@pytest.mark.parametrize("several", [False, True])
def test_an_argument_that_a_policy_got_later_is_no_change_while_it_has_its_default(tmp_path, several):
    def job(coefficient, **later):
        own = {"coefficient": coefficient, **later}
        router = ["noisy_topk", "z_loss"] if several else "noisy_topk"
        arguments = {"noisy_topk": own, "z_loss": {"coefficient": 1e-3}} if several else own
        return {"pretrain": {"router": router, "arguments": arguments, "mixing": "static", "mixing_arguments": {}}}

    begun, path = job(1e-2), tmp_path / "settings.json"
    path.write_text(json.dumps(begun))
    assert as_recorded(path, job(1e-2, compat=False)) == begun
    for other in (job(1e-2, compat=True), job(2e-2, compat=False)):
        assert as_recorded(path, other) == other


def test_a_damaged_checkpoint_is_an_error_and_not_a_start_from_zero(tmp_path, source, domains):
    out = tmp_path / "out"
    with pytest.raises(InterruptedRun):
        pretrain(source, CONFIG, domains=domains, out=out, on_progress=SignalAt(signal.SIGTERM, "train step", 3))
    (state,) = (out / "checkpoints" / "step-00000003").glob("*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    with pytest.raises(InputError, match=r"\.safetensors: sha256 .* differs"):
        pretrain(source, CONFIG, domains=domains, out=out)


def test_the_log_is_cut_to_the_checkpoint_and_never_padded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, position=0)
    log.write({"event": "step", "step": 1})
    position = log.position
    log.write({"event": "step", "step": 2})
    log.close()
    with path.open("ab") as file:
        file.write(b'{"event": "st')  # torn by a crash
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    MetricsLog(path, position=position).close()
    assert json.loads(path.read_bytes()) == {"event": "step", "step": 1}
    with pytest.raises(InputError, match=f"{position} bytes; needed at least {position + 1}"):
        MetricsLog(path, position=position + 1)


def test_a_disk_that_is_full_leaves_the_last_checkpoint(tmp_path, source, domains, unstopped):
    """The kernel refuses files over 100 kB from step 6 on: the checkpoint of step 10 cannot be written."""
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)

    def progress(what, done, total):
        if what.startswith("train step") and done == 6:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(ResourceError, match=r"cannot write: .*File too large") as caught:
            pretrain(source, CONFIG, domains=domains, out=out, on_progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.exit_code == 4
    assert Manifest.read(out / "checkpoints" / "step-00000005") is not None
    assert pretrain(source, CONFIG, domains=domains, out=out).resumed_from == 5
    assert contents(out) == unstopped
