"""The file of a layer's statistics: it comes back as it was, and nothing damaged or hostile gets through."""

from __future__ import annotations

import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from prismoe.errors import InputError, UsageError
from prismoe.folder import Manifest
from prismoe.stats import QUANTITIES, TENSORS, NeuronStats
from prismoe.stats.calibration import Calibration

F, D, S, C, K = 6, 4, 5, 2, 3


@pytest.fixture
def stats() -> NeuronStats:
    draw = np.random.default_rng(0)
    marked = np.array([[0, 1, 2], [0, 2, 5], [1, 2, 3], [0, 1, 5], [3, 4, 5]], np.int32)
    columns = np.zeros((S, F), np.int32)
    np.put_along_axis(columns, marked, 1, axis=1)
    return NeuronStats(
        layer=3,
        num_neurons=F,
        hidden_size=D,
        num_tokens=S,
        mean=draw.normal(size=F).astype(np.float32),
        mean_abs=draw.random(F, np.float32),
        mean_square=draw.random(F, np.float32),
        cluster_tokens=np.array([2, 3]),
        importance=draw.random((C, F), np.float32),
        rate=(columns.sum(0) / S).astype(np.float32),
        marks=marked,
        coactivation=columns.T @ columns,
        inputs=draw.normal(size=(S, D)).astype(np.float32),
        scores=draw.random((S, F), np.float32).astype(ml_dtypes.bfloat16),
        sample_clusters=np.array([0, 1, 1, 0, 1], np.int32),
        output_norm=1.5,
        output_rms=2.0,
    )


def test_comes_back_as_it_was(stats: NeuronStats, tmp_path: Path) -> None:
    again = NeuronStats.load(stats.save(tmp_path / "a.safetensors"))
    for item in fields(NeuronStats):
        old, new = getattr(stats, item.name), getattr(again, item.name)
        np.testing.assert_array_equal(np.asarray(new), np.asarray(old), err_msg=item.name)
        assert np.asarray(new).dtype == np.asarray(old).dtype, item.name
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_fields_that_were_not_asked_for_stay_none(stats: NeuronStats, tmp_path: Path) -> None:
    little = NeuronStats.load(replace(stats, **{**dict.fromkeys(TENSORS), "rate": stats.rate}).save(tmp_path / "a"))
    assert {name for name in TENSORS if getattr(little, name) is not None} == {"rate"}
    assert little.need("rate") is little.rate
    with pytest.raises(UsageError, match=r"^layer 3: calibration has no importance; needed quantity importance \(hint"):
        little.need("importance")


def test_every_field_belongs_to_a_quantity() -> None:
    given = {name for names in QUANTITIES.values() for name in names} | {"cluster_tokens", "sample_clusters"}
    scalars = {"layer", "num_neurons", "hidden_size", "num_tokens"}
    assert given | scalars == {item.name for item in fields(NeuronStats)}


def changed(array: Any, index: Any, value: Any) -> Any:
    copy = np.array(array)
    copy[index] = value
    return copy


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("mean", 0, np.nan, "mean: holds numbers that are not finite"),
        ("mean_abs", 0, -1.0, "mean_abs: is negative"),
        ("importance", (1, 2), np.inf, "importance: holds numbers that are not finite"),
        ("rate", 1, 1.5, "rate: a share above 1"),
        ("cluster_tokens", 1, 0, "cluster_tokens: a data cluster without tokens"),
        ("marks", (0, 0), 1, "marks: not ascending neurons below 6"),
        ("marks", (0, 2), 6, "marks: not ascending neurons below 6"),
        ("marks", (0, 0), -1, "marks: is negative"),
        ("coactivation", (0, 1), 0, "coactivation: not symmetric counts"),
        ("coactivation", (0, 0), 6, "coactivation: not symmetric counts"),
        ("inputs", (0, 0), -np.inf, "inputs: holds numbers that are not finite"),
        ("scores", (0, 0), np.nan, "scores: is negative or not finite"),
        ("scores", (0, 0), -1.0, "scores: is negative or not finite"),
        ("sample_clusters", 0, 2, "sample_clusters: a data cluster that is not one of 2"),
    ],
)
def test_wrong_numbers_are_refused(
    stats: NeuronStats, tmp_path: Path, name: str, index: Any, value: Any, message: str
) -> None:
    wrong = replace(stats, **{name: changed(getattr(stats, name), index, value)})
    with pytest.raises(InputError) as caught:
        wrong.save(tmp_path / "a")
    assert f"layer 3: {message}" in str(caught.value)
    assert not (tmp_path / "a").exists()
    # The same numbers in a file that somebody else wrote.
    path = stats.save(tmp_path / "b")
    data, good = path.read_bytes(), np.ascontiguousarray(getattr(stats, name)).tobytes()
    assert data.count(good) == 1
    path.write_bytes(data.replace(good, np.ascontiguousarray(getattr(wrong, name)).tobytes()))
    with pytest.raises(InputError) as caught:
        NeuronStats.load(path)
    assert f"{path}: {message}" in str(caught.value)


def test_shapes_have_to_agree(stats: NeuronStats, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"layer 3: rate: shape \[5\]; needed F = 6"):
        replace(stats, rate=stats.need("rate")[:5]).save(tmp_path / "a")
    with pytest.raises(InputError, match=r"layer 3: inputs: shape \[4, 4\]; needed S = 5"):
        replace(stats, inputs=stats.need("inputs")[:4]).save(tmp_path / "a")
    with pytest.raises(InputError, match=r"layer 3: mean: shape \[0\]; needed \[F\]"):
        replace(stats, mean=np.empty(0, np.float32)).save(tmp_path / "a")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h: h["__metadata__"].update(format="pt"), "format 'pt'; needed neuron statistics"),
        (lambda h: h["__metadata__"].pop("scalars"), "not valid JSON"),
        (lambda h: h["__metadata__"].update(scalars="{}"), "header is damaged; needed scalars"),
        (lambda h: scalar(h, layer=True), "layer: True; needed a layer number"),
        (lambda h: scalar(h, num_neurons=-1), "num_neurons: -1; needed a count"),
        (lambda h: scalar(h, num_neurons=7), "mean: shape [6]; needed F = 7"),
        (lambda h: scalar(h, output_norm=-0.5), "output_norm: -0.5; needed a finite number"),
        (lambda h: scalar(h, output_rms="2"), "output_rms: '2'; needed a finite number"),
        (lambda h: h.update(extra=h.pop("mean")), "unexpected tensor 'extra'"),
        (lambda h: h["mean"].update(dtype="I32"), "mean: dtype I32; needed F32"),
        (lambda h: h["inputs"].update(shape=[20]), "inputs: shape [20]; needed [S, D]"),
    ],
)
def test_hostile_headers_are_refused(stats: NeuronStats, tmp_path: Path, edit: Any, message: str) -> None:
    path = stats.save(tmp_path / "a.safetensors")
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(InputError) as caught:
        NeuronStats.load(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def scalar(header: dict[str, Any], **values: Any) -> None:
    header["__metadata__"]["scalars"] = json.dumps({**json.loads(header["__metadata__"]["scalars"]), **values})


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_cut_files_are_refused(stats: NeuronStats, tmp_path: Path, kept: int) -> None:
    path = stats.save(tmp_path / "a.safetensors")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError):
        NeuronStats.load(path)


RESULT = {
    **{"num_layers": 2, "num_clusters": 3, "num_sequences": 40, "num_tokens": 800, "loss": 2.5},
    **{"cluster_domains": [[10], [20], [10]], "domains": ["a"]},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"sequences\.safetensors: missing; needed an entry in manifest\.json"),  # its counts pass
        ({"num_layers": 0}, "not a readable manifest .*0 is not a count"),
        ({"num_layers": -1}, "not a readable manifest .*-1 is not a count"),
        ({"num_layers": 2.0}, r"not a readable manifest .*2\.0 is not a count"),
        ({"num_layers": 1 << 60}, "not a readable manifest .* is not a count"),
        ({"num_tokens": "800"}, "not a readable manifest .*'800' is not a count"),
        ({"num_clusters": 41}, "not a readable manifest .*counts of clusters, sequences and tokens"),
        ({"num_tokens": 39}, "not a readable manifest .*counts of clusters, sequences and tokens"),
        ({"loss": "low"}, "not a readable manifest"),
        ({"cluster_domains": [["many"]]}, "not a readable manifest"),
        ({"cluster_domains": 7}, "not a readable manifest"),
    ],
)
def test_counts_of_a_calibration_that_cannot_be(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    """The manifest is whole by its own hash: what is wrong is what somebody wrote into it."""
    config = {"quantities": ["activation"], "result": {**RESULT, **change}}
    Manifest("calibrate", parents={"source": "f" * 64}, config=config, files={}).write(tmp_path)
    with pytest.raises(InputError, match=message):
        Calibration.open(tmp_path)
