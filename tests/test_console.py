"""Words for numbers, tables that fit, and progress in a log."""

from __future__ import annotations

import pytest
from rich.console import Console

from prismoe import console
from prismoe.console import Screen, bytes_text, count_text, seconds_text


def test_numbers_in_words() -> None:
    counts = {12: "12", 0.5: "0.5", 1860: "1,860", 81_600: "81.6 k", 4_100_000: "4.10 M", 6_738_415_616: "6.74 B"}
    assert {number: count_text(number) for number in counts} == counts
    sizes = {12: "12 B", 4_768: "4.8 kB", 5_000_000_000: "5.0 GB", 1.5e12: "1.5 TB"}
    assert {number: bytes_text(number) for number in sizes} == sizes
    times = {0.04: "0.0 s", 9.94: "9.9 s", 12.3: "12 s", 75: "1:15", 3700: "1:01:40"}
    assert {number: seconds_text(number) for number in times} == times


def test_a_table_in_a_log_is_aligned_and_has_no_trailing_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().table(["name", "number"], [["a long name", "1"], ["b", "1,000"]])
    assert capsys.readouterr().out.splitlines() == ["name         number", "a long name       1", "b             1,000"]


def test_a_table_that_is_too_wide_goes_on_below(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is cut and no number folded: every cell is there once, the first column in each part."""
    screen = Screen()
    screen.out = Console(width=30, force_terminal=True, color_system=None)
    names = [f"{group}\n{name}" for group in ("loss", "bits") for name in ("dense", "moe", "static")]
    screen.table(["\ntask", *names], [["arc_easy", *(f"{number}.12345" for number in range(6))]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "             loss",
        "task        dense      moe",
        "arc_easy  0.12345  1.12345",
        "",
        "             loss     bits",
        "task       static    dense",
        "arc_easy  2.12345  3.12345",
        "",
        "             bits",
        "task          moe   static",
        "arc_easy  4.12345  5.12345",
    ]


def test_text_is_folded_and_a_number_as_wide_as_the_terminal_too(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.out = Console(width=24, force_terminal=True, color_system=None)
    screen.table(["a", "words"], [["name", "some words " * 3]], justify="ll")
    screen.table(["a", "number"], [["name", "1" * 30]])
    shown = "".join(capsys.readouterr().out.split())
    assert shown == "awordsname" + "somewords" * 3 + "anumbername" + "1" * 30


def test_names_and_numbers_are_not_taken_for_markup(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    screen.line("[bold]x[/bold]")
    screen.table(["[red]"], [["[/red]"]])
    screen.pairs({"[a]": "[b]"})
    screen.error("[c]")
    out, err = capsys.readouterr()
    assert [line.strip() for line in out.splitlines()] == ["[bold]x[/bold]", "[red]", "[/red]", "[a]  [b]"]
    assert err == "prismoe: [c]\n"


def test_json_keeps_stdout_to_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(json=True)
    screen.title("x")
    screen.line("x")
    screen.table(["x"], [["y"]])
    screen.stage("plan", "made", "x", 1.0)
    screen.note("x")
    screen.result({"ä": 1})
    assert capsys.readouterr() == ('{"ä": 1}\n', "")
    with pytest.raises(ValueError, match="JSON compliant"):
        screen.result({"x": float("nan")})


def test_short_work_leaves_no_line_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with Screen().progress() as report:
        for done in range(11):
            report("step", done, 10)
    assert capsys.readouterr() == ("", "")


def test_long_work_leaves_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LOG_EVERY_S", 0.0)
    with Screen().progress() as report:
        for done in (100, 101, 102):  # a resumed run: the first hundred are not our work
            report(f"train step: loss {done / 100}", done, 102)
        report("bytes written", 2_500_000, 5_000_000)
        report("train step: loss 9", 1, 102)  # the same work begun again
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "train step  100/102  loss 1.0",
        "train step  101/102  loss 1.01",
        "train step  102/102  loss 1.02",
        "bytes written  2.5 MB/5.0 MB",
        "train step  1/102  loss 9",
    ]
