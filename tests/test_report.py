"""The report: complete, self-contained, well-formed, and readable by everyone."""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from prismoe.errors import InputError
from prismoe.report import write_report
from prismoe.report.drawing import draw
from prismoe.report.page import Figure, Findings, Panel, Section, Table
from prismoe.report.pictures import write_pictures
from prismoe.report.sections import balance, certificate, pruned, routing_drift, training
from prismoe.report.style import COLOURS, HEAT, LEVELS, MARKERS, thinned
from tests.report import random_trace
from tests.runs import copy_of, finished

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Tags that do not match, every attribute, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def text() -> str:
    return (finished()[0] / "run" / "report.html").read_text(encoding="utf-8")


def test_every_part_is_there_with_the_numbers_of_the_receipts(text: str) -> None:
    page = Page(text)
    for part in ("scores", "training", "plan", "certificate", "data", "stages", "machine", "config", "files"):
        assert ("section", "id", part) in page.attributes
    receipts = {done.stage: done.receipt for done in finished()[1]}
    wanted = [f"{row['perplexity']:,.2f}" for row in receipts["eval"]["scores"]]
    wanted += [f"{row['bits_per_byte']:.3f}" for row in receipts["eval"]["scores"]]
    wanted += [check["meaning"] for check in receipts["verify"]["checks"]]
    wanted += [row["sha256"] for row in receipts["convert"]["files"].values()]
    wanted += [f"{receipts['plan']['account']['total_parameters']:,}"]
    assert [word for word in wanted if word not in page.words] == []
    figures = set(re.findall(r'href="figures/(\w+)\.png"', text))
    assert figures >= {
        "scores",
        "training_loss",
        "heldout_loss",
        "learning_rate",
        "gradient_norm",
        "load",
        "norm_ratios",
    }
    assert text.count("<svg") == text.count('<div role="img"') >= len(figures)


def test_it_is_well_formed_and_every_id_is_one(text: str) -> None:
    page = Page(text)
    assert (page.wrong, page.open) == ([], [])
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    uses = {value for _, name, value in page.attributes if name in ("href", "xlink:href") and value.startswith("#")}
    uses |= {f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)}
    assert uses <= {f"#{name}" for name in ids}
    told = [value for tag, name, value in page.attributes if (tag, name) == ("div", "aria-label")]
    assert len(told) >= text.count("<svg")
    assert all(told)


def test_it_needs_nothing_from_elsewhere(text: str) -> None:
    page = Page(text)
    loads = [row for row in page.attributes if row[1] in ("src", "srcset", "href", "xlink:href", "data", "action")]
    links = [row[2] for row in loads if row[0] == "a" and not row[2].startswith("#")]
    assert [row for row in loads if row[0] != "a" and not row[2].startswith("#")] == []
    assert [place for place in links if not (finished()[0] / "run" / place).is_file()] == []  # beside the page
    assert not re.search(r"<(script|link|iframe|object|embed)|@import|url\((?!#)", text)


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose model has a hostile name, its report written."""
    out = copy_of(tmp_path_factory.mktemp("renamed"))
    state = json.loads((out / "run.json").read_text())
    state["plan"]["receipt"]["source_name"] = "models/<img src=x onerror=alert(1)>&"
    (out / "run.json").write_text(json.dumps(state))
    write_report(out)
    return out


def test_a_name_cannot_become_markup(renamed: Path) -> None:
    text = (renamed / "report.html").read_text()
    assert "<img" not in text
    assert "&lt;img src=x onerror=alert(1)&gt;&amp; as mixtral" in text


def test_equal_runs_give_equal_reports(renamed: Path) -> None:
    first = (renamed / "report.html").read_bytes()
    free = re.compile(rb"[\d.]+ GB")  # disk and memory that happen to be free
    assert free.sub(b"", write_report(renamed).read_bytes()) == free.sub(b"", first)


def test_a_report_of_a_run_that_is_not_finished(tmp_path: Path) -> None:
    out = copy_of(tmp_path)
    state = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({key: state[key] for key in ("plan", "convert")}))
    lines = (out / "train" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "train" / "metrics.jsonl").write_text("".join(lines[:4]))
    text = write_report(out).read_text()
    assert "Not finished: 3 steps so far." in text
    assert 'id="scores"' not in text
    assert 'id="plan"' in text
    with pytest.raises(InputError, match="no finished plan; needed a run folder"):
        write_report(tmp_path)


def drawn(figure: Figure) -> str:
    return "".join(draw([figure])[0].svgs)


def figure_of(section: Section | None, name: str) -> Figure:
    assert section is not None
    return next(block for block in section.blocks if isinstance(block, Figure) and block.name == name)


def found_in(folder: Path, *lines: dict[str, Any], **receipts: Any) -> Findings:
    """What a run left: a training log of these lines, and receipts."""
    (folder / "train").mkdir()
    (folder / "train" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Findings(folder, receipts, dict.fromkeys(receipts, 1.0))


def test_figures_draw_what_they_are_given(tmp_path: Path) -> None:
    step = {"event": "step", "step": 1, "max_over_mean": 1.2}
    evals = [{"event": "eval", "step": step, "load": [[0.3, 0.2, 0.3, 0.2]] * 2} for step in (0, 10)]
    section = balance.section(found_in(tmp_path, step, *evals))
    load = figure_of(section, "load")
    assert drawn(load).count(">1.2<") == 2 * 2 * 2  # a share of 0.3 among 4, twice a layer, 2 layers, 2 panels
    assert drawn(load) == drawn(load)
    layers = {name: float(y) for y, name in re.findall(r'<text[^>]*y="([\d.]+)"[^>]*>([01])</text>', drawn(load))}
    assert layers["0"] < layers["1"]  # the first layer is at the top
    assert "0.80 to 1.20 × the mean" in load.panels[0].shows
    rows = [{"layer": 0, "kind": "partition", "norm_ratio": 0.5}, {"layer": 1, "kind": "dense"}]
    receipt = {"checks": [], "layers": rows, "num_tokens": 1, "input": "text", "passed": True}
    receipt["checks"] = [{"name": "plan", "passed": True, "measured": 0.0, "limit": None, "meaning": "", "where": ""}]
    norms = drawn(figure_of(certificate.section(Findings(tmp_path, {"verify": receipt}, {})), "norm_ratios"))
    assert norms.startswith("<svg")
    assert "width=" not in norms.partition(">")[0]


def test_the_distance_to_a_teacher_is_drawn_where_there_is_one(tmp_path: Path) -> None:
    from matplotlib.figure import Figure as Canvas

    heldout = {"event": "eval", "step": 0, "heldout": {"own": {"loss": 4.0, "standard_error": None}}}
    fixed = {"event": "step", "loss": 4.0, "lr": 1e-3, "gradient_norm": 1.0, "router_gradient_norm": 0.1}
    steps = [{**fixed, "step": step, "teacher_loss": 1 / step} for step in (1, 2, 4)]
    figure = figure_of(training.section(found_in(tmp_path, heldout, *steps)), "teacher_loss")
    assert figure.panels[0].shows == "Distance to the teacher: 1 at first, 0.25 at last"
    axes = Canvas().subplots()
    figure.panels[0].draw(axes)
    assert axes.lines[0].get_xydata().tolist() == [[1, 1], [2, 0.5], [4, 0.25]]
    (tmp_path / "alone").mkdir()
    alone = training.section(found_in(tmp_path / "alone", heldout, {**fixed, "step": 1}))
    assert alone is not None
    assert not [block for block in alone.blocks if isinstance(block, Figure) and block.name == "teacher_loss"]


def test_a_long_log_is_thinned_to_what_it_says() -> None:
    draw = np.random.default_rng(0)
    steps, losses = np.arange(1, 1001), draw.random(1000)
    x, mean, low, high = thinned(steps, losses, most=100)
    blocks = losses.reshape(100, 10)
    assert np.allclose(x, steps.reshape(100, 10).mean(axis=1))
    assert np.allclose(mean, blocks.mean(axis=1))
    assert (low == blocks.min(axis=1)).all()
    assert (high == blocks.max(axis=1)).all()
    x, mean, low, high = thinned([3, 4], [1.0, 2.0])
    assert [list(part) for part in (x, mean, low, high)] == [[3, 4], [1, 2], [1, 2], [1, 2]]


def test_pictures_for_slides_have_the_size_that_is_stated(text: str) -> None:
    folder = finished()[0] / "run" / "figures"
    pictures = {path.stem: path.read_bytes() for path in folder.glob("*.png")}
    stated = dict(re.findall(r'href="figures/(\w+)\.png">[^<]*\((\d+ × \d+)\)</a>', text))
    assert set(pictures) == set(stated) >= {"scores", "load", "heldout_loss"}
    for name, data in pictures.items():
        width, height = struct.unpack(">II", data[16:24])
        assert stated[name] == f"{width} × {height}"
        assert min(width, height) >= 450  # 200 dots an inch, at least 2.4 inches
    small = Figure("two", "Two panels", [Panel(lambda axes: axes.plot([1, 2]), "a line")] * 2)
    (picture,) = draw([small])
    assert struct.unpack(">II", picture.png[16:24]) == (picture.width, picture.height) == (2 * 960, 670)  # 4.8 × 3.0 in
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
    assert (pixels[[0, -1, 70], :] == 255).all()  # white around
    halves = [pixels[70:, side : side + 960] for side in (0, 960)]
    assert (halves[0] == halves[1]).all()  # equal panels beside each other
    assert halves[0].min() < 128


def test_a_picture_that_the_page_no_longer_has_goes(tmp_path: Path) -> None:
    first, second = (Figure(name, name, [Panel(lambda axes: axes.plot([1, 2]), "a line")]) for name in ("one", "two"))
    (picture,) = draw([first])
    write_pictures(tmp_path, {first: picture})
    Image.new("RGB", (2, 2)).save(tmp_path / "figures" / "own.png")
    write_pictures(tmp_path, {second: picture})
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"own.png", "two.png"}


def test_drift_is_that_of_the_two_traces(tmp_path: Path) -> None:
    (tmp_path / "trace").mkdir()
    now = random_trace(layers=2, experts=4, top_k=2, sample=64)
    now.save(tmp_path / "trace" / "trace.safetensors")
    assert routing_drift.section(Findings(tmp_path, {}, {})) is None
    now.save(tmp_path / "trace" / "before.safetensors")
    section = routing_drift.section(Findings(tmp_path, {}, {}))
    assert "0 to 0 %" in figure_of(section, "load_moved").panels[0].shows
    assert "100 to 100 %" in figure_of(section, "choices_kept").panels[0].shows
    random_trace(layers=2, experts=4, top_k=2, sample=64, seed=1).save(tmp_path / "trace" / "before.safetensors")
    section = routing_drift.section(Findings(tmp_path, {}, {}))
    assert section is not None
    assert "different text" in section.blocks[0].words  # type: ignore[union-attr]


def test_experts_that_were_left_out_are_told(tmp_path: Path) -> None:
    (tmp_path / "less").mkdir()
    receipt = {"num_experts": 3, "num_experts_before": 4, "criterion": "load", "warnings": ["uneven"]}
    receipt |= {"parameters": 900, "parameters_before": 1000, "parameters_saved": 100, "removed_share": 0.125}
    receipt |= {"layers": [{"layer": 0, "kept": [0, 1, 3], "removed": [2], "removed_share": 0.125}]}
    receipt |= {"removed_share_of": {"a": 0.1, "b": 0.15}, "perplexity": {"a": {"before": 4.0, "after": 4.5}}}
    (tmp_path / "less" / "pruning.json").write_text(json.dumps(receipt))
    section = pruned.section(Findings(tmp_path, {}, {}))
    assert section is not None
    tables = [block.rows for block in section.blocks if isinstance(block, Table)]
    assert tables == [[["0", "2", "12.5 %"]], [["a", "10.0 %", "4.00", "4.50"], ["b", "15.0 %", "", ""]]]
    (tmp_path / "less" / "pruning.json").write_text("{")
    section = pruned.section(Findings(tmp_path, {}, {}))
    assert section is not None
    assert "cannot be read" in section.blocks[0].words  # type: ignore[union-attr]


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.1."""
    channels = linear(colour)
    return float(channels @ [0.2126, 0.7152, 0.0722])


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def test_text_has_contrast(text: str) -> None:
    colours = dict(re.findall(r"--(ink|soft|good|bad): (#[0-9a-f]{6})", text))
    assert set(colours) == {"ink", "soft", "good", "bad"}
    assert {name: 1.05 / (luminance(colour) + 0.05) for name, colour in colours.items()} == pytest.approx(
        dict.fromkeys(colours, 21), abs=21 - 4.5
    )


def seen(colour: str) -> Iterator[np.ndarray]:
    """CIE Lab of a colour as seen with normal sight, without long and without medium cones (Viénot et al. 1999)."""
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    no_long = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    no_medium = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for loss in (np.eye(3), no_long, no_medium):
        rgb = np.clip(np.linalg.inv(to_lms) @ loss @ to_lms @ linear(colour), 0, 1)
        xyz = np.cbrt(to_xyz @ rgb / (to_xyz @ np.ones(3)))
        yield np.array([116 * xyz[1] - 16, 500 * (xyz[0] - xyz[1]), 200 * (xyz[1] - xyz[2])])


def test_neighbouring_lines_differ_for_every_eye() -> None:
    looks = list(zip(COLOURS, MARKERS, strict=True))
    assert len({marker for _, marker in looks}) == len(looks)
    for (first, _), (second, _) in combinations(looks[:4], 2):  # more lines than these are told apart by marker too
        distances = [float(np.linalg.norm(a - b)) for a, b in zip(seen(first), seen(second), strict=True)]
        assert min(distances) > 12, (first, second, distances)


def test_a_heat_map_gets_lighter_only_for_every_eye() -> None:
    shades = [mpl.colors.to_hex(colour) for colour in mpl.colormaps[HEAT].resampled(LEVELS)(range(LEVELS))]
    lightness = np.array([[lab[0] for lab in seen(shade)] for shade in shades])  # [shades, kinds of sight]
    assert (np.diff(lightness, axis=0) > 1.0).all()
    assert np.ptp(lightness, axis=0).min() > 60
