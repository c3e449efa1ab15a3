"""The report in a real browser: nothing is complained about or fetched, sticks out or lies on top of other text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prismoe.report import write_report
from tests.report import wide_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"phone": 390, "laptop": 1280}

OVERLAPS = """
() => [...document.querySelectorAll('svg')].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const words = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim());
    const slanted = text => Math.abs(text.getCTM().b) > 0.01 && Math.abs(text.getCTM().a) > 0.01;
    const boxes = words.filter(text => !slanted(text)).map(text => [text.textContent, text.getBoundingClientRect()]);
    const name = svg.parentElement.getAttribute('aria-label');
    const wrong = boxes.filter(([, box]) => box.left < frame.left - 2 || box.right > frame.right + 2
        || box.top < frame.top - 2 || box.bottom > frame.bottom + 2).map(([text]) => `${name}: ${text} is cut off`);
    const slack = 0.25;  // of the smaller box: letters do not fill theirs
    for (let i = 0; i < boxes.length; i++) for (let j = 0; j < i; j++) {
        const [a, b] = [boxes[i][1], boxes[j][1]];
        const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > slack * Math.min(a.width, b.width) && high > slack * Math.min(a.height, b.height))
            wrong.push(`${name}: ${boxes[i][0]} over ${boxes[j][0]}`);
    }
    return wrong;
})
"""
STICKS_OUT = """
() => [...document.querySelectorAll('main *, header *, nav *, dl *')].filter(item => {
    const scrolls = item.parentElement.closest('.wide, pre');
    if (scrolls || item.closest('svg')) return false;
    const box = item.getBoundingClientRect();
    return box.right > innerWidth + 1 || box.left < -1;
}).map(item => item.outerHTML.slice(0, 120))
"""
UNNAMED = """
() => [...document.querySelectorAll('table')].filter(table => !table.querySelector('th[scope]')).length
    + [...document.querySelectorAll('svg')].filter(svg => !svg.closest('[role=img][aria-label]')).length
"""

SMALLEST = """
() => Math.min(...[...document.querySelectorAll('svg text')].map(text =>
    parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome is installed: the report was not looked at in a browser")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(wide_run(tmp_path_factory.mktemp("wide")))


@pytest.fixture(params=list(WIDTHS))
def page(request: pytest.FixtureRequest, browser: Any, report: Path) -> Iterator[Any]:
    opened = browser.new_page(viewport={"width": WIDTHS[request.param], "height": 800})
    opened.set_default_timeout(60_000)
    opened.complaints = []
    opened.fetched = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.on("request", lambda request: opened.fetched.append(request.url))
    opened.goto(report.as_uri())
    yield opened
    opened.close()


def test_it_is_whole_and_silent_at_every_width(page: Any, report: Path) -> None:
    assert page.complaints == []
    assert page.fetched == [report.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.evaluate(STICKS_OUT) == []
    assert page.evaluate(OVERLAPS) == []
    assert page.evaluate(UNNAMED) == 0
    assert page.evaluate(SMALLEST) >= 6.5


def test_what_is_wrong_would_be_seen(browser: Any, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    words = '<text x="19" y="40">one</text><text x="23" y="40">two</text>'
    svg = f'<div aria-label="x"><svg viewBox="0 0 99 60">{words}</svg></div>'
    bad.write_text(f'<main><table><td>1</table>{svg}<div style="width:3000px">wide</div></main>')
    opened = browser.new_page(viewport={"width": 390, "height": 800})
    opened.goto(bad.as_uri())
    assert opened.evaluate(OVERLAPS) == ["x: two over one"]
    assert len(opened.evaluate(STICKS_OUT)) == 1
    assert opened.evaluate(UNNAMED) == 2
    opened.close()


def test_it_prints(browser: Any, report: Path) -> None:
    opened = browser.new_page()
    opened.goto(report.as_uri())
    pdf = opened.pdf(prefer_css_page_size=True)
    assert pdf.startswith(b"%PDF-")
    opened.emulate_media(media="print")
    opened.set_viewport_size({"width": 695, "height": 1000})  # A4 without its margins, in CSS pixels
    assert opened.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert opened.evaluate("[...document.querySelectorAll('.wide')].filter(x => x.scrollWidth > 700).length") == 0
    assert not opened.is_visible("nav")
    opened.close()
