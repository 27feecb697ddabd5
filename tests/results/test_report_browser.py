"""The report in a real browser: no console error; table, filter, plots, texts, trajectories work by keyboard."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tsdfm_bench.results import schema
from tsdfm_bench.results.report import Material, Texts, Trace, render_report

try:
    from selenium import webdriver
except ImportError:
    webdriver = None
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
CHROMEDRIVER = shutil.which("chromedriver")
MISSING = [
    what
    for what, found in (
        ("selenium (pip install -e '.[dev]')", webdriver),
        ("Chromium (apt-get install chromium)", CHROMIUM),
        ("its driver (apt-get install chromium-driver)", CHROMEDRIVER),
    )
    if found is None
]
ASKED = os.environ.get("TSDFM_BENCH_BROWSER") or (
    "required" if os.environ.get("CI", "").lower() in ("1", "true") else ""
)
needs_browser = pytest.mark.skipif(
    bool(MISSING), reason=f"THE REPORT WAS NOT TESTED IN A BROWSER: there is no {', no '.join(MISSING)}"
)

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
)  # fmt: skip
HOSTILE = "</p><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>\u202etxt\x00"
KEYS = {"right": "\ue014", "enter": "\ue007"}


def test_a_browser_is_there_where_one_is_expected() -> None:
    """CI=true or TSDFM_BENCH_BROWSER=required ("optional" overrules CI): what is skipped must not pass for tested."""
    if ASKED != "required":
        pytest.skip("no browser is required here: neither CI nor TSDFM_BENCH_BROWSER=required is set")
    assert not MISSING, f"a browser is required here, but there is no {', no '.join(MISSING)}"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium with a profile of its own and its console recorded."""
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER))
    started.set_window_size(1280, 1000)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def page(cell: Callable[..., list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report with a row of every kind, hostile names and texts among them."""
    rows = []
    for method, source, ppl in (("dfm", "uniform", 60.0), ("tsdfm", "uniform", 40.0), ("mdlm", "mask", 90.0)):
        for steps, better in ((8, 1.0), (64, 0.7)):
            rows += cell(method, {"judge": ppl * better}, 3.9 - better, source=source, steps=steps, calls=steps)
    rows += cell(f"x{HOSTILE}", {"judge": 75.0}, 3.7, source="mask", steps=8, calls=8)
    rows += cell("real", {"judge": 30.0}, 3.2, kind="reference") + cell("loop", {"judge": 5.0}, 1.0, kind="reference")
    summary = schema.from_rows(rows)
    cells = list(dict.fromkeys(summary["cell"]))
    texts = {
        name: Texts([f"the {i} text of number {k} {HOSTILE}" for k in range(3)], 64) for i, name in enumerate(cells)
    }
    states = np.array([[9, 9, 9], [9, 1, 9], [0, 1, 9], [0, 1, 2]])
    trace = Trace(cells[0], 0, [1, 2, 3, 4], states, {0: "zero ", 1: "one ", 2: HOSTILE}, 4)
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    long = "the student's entropy is below the teacher's, from which alone a lower perplexity follows; " * 2
    judged = {"where": {"task": "sotu", "scorer": "judge", "source": "uniform"}, "status": "contradicted", "n": 256}
    judged |= {"value": 3.0, "low": -3.0, "high": 8.0, "n_needed": None, "cells": {}, "reason": long}
    verdict = {
        "id": "c",
        "title": "a claim",
        "statement": "It holds.",
        "source": "abstract",
        "reason": long,
        "note": "",
    }
    verdict |= {"formula": "ppl(a) / ppl(b)", "holds": "< 1", "unit": "", "published": 32.0, "confidence": "stated"}
    made = Material(
        "a run",
        summary,
        verdicts=[verdict | {"status": "contradicted", "instances": [judged] * 2}],
        texts=texts,
        traces=[trace],
        commands=dict.fromkeys(cells, "tsdfm-bench run"),
    )
    path.write_text(render_report(made), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def open_page(driver: Any, page: str) -> Iterator[Any]:
    """The report freshly loaded; afterwards the console must be silent and nothing hostile may have run."""
    driver.get("about:blank")
    driver.get(page)
    yield driver
    assert driver.get_log("browser") == []
    assert driver.execute_script("return window.hacked ?? null") is None


def find(driver: Any, selector: str) -> list[Any]:
    found: list[Any] = driver.find_elements("css selector", selector)
    return found


def column(driver: Any, place: int) -> list[str]:
    """Shown texts of a column of the generators."""
    script = """return [...document.querySelectorAll('#table tbody.method tr[data-row]')]
      .filter((row) => !row.hidden).map((row) => row.cells[arguments[0]].textContent.trim())"""
    found: list[str] = driver.execute_script(script, place)
    return found


def heads(driver: Any) -> list[str]:
    return [head.text.split("\n")[0] for head in find(driver, "#table thead th")]


def press(element: Any, key: str) -> None:
    element.send_keys(KEYS.get(key, key))


@needs_browser
def test_a_column_sorts_by_its_numbers_with_the_keyboard_alone(open_page: Any) -> None:
    place = heads(open_page).index("gen-PPL")
    before = column(open_page, place)
    button = find(open_page, "#table thead th button")[place]
    press(button, "enter")
    numbers = [float(text.split("±")[0]) for text in column(open_page, place)]
    assert numbers == sorted(numbers)
    assert column(open_page, place) != before
    head = find(open_page, "#table thead th")[place]
    assert head.get_attribute("aria-sort") == "ascending"
    press(button, "enter")
    assert [float(text.split("±")[0]) for text in column(open_page, place)] == numbers[::-1]
    assert head.get_attribute("aria-sort") == "descending"


@needs_browser
def test_the_filter_acts_on_table_plots_and_texts(open_page: Any) -> None:
    find(open_page, "#q")[0].send_keys("tsdfm 8")
    shown = find(open_page, "#shown")[0].text
    assert shown.startswith("1 of 9 rows")
    assert column(open_page, 0) == ["tsdfm"]
    row = find(open_page, "#table tbody.method tr[data-row]:not([hidden])")[0].get_attribute("data-row")
    points = "return [...document.querySelectorAll('.chart .point:not(.off)')].map((point) => point.dataset.row)"
    assert set(open_page.execute_script(points)) == {row}
    cards = find(open_page, "details.sequence[open] .card:not([hidden])")
    assert [card.get_attribute("data-row") for card in cards] == [row]
    open_page.execute_script("document.querySelector('.filter').reset()")
    for select in find(open_page, "#facets select"):
        assert len(select.find_elements("css selector", "option")) >= 3
    open_page.execute_script(
        "const s = document.querySelector('[data-facet=source]'); s.value = 'mask';"
        "s.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert set(column(open_page, heads(open_page).index("source"))) == {"mask"}


@needs_browser
def test_a_plot_can_be_read_by_keyboard_and_its_curves_hidden(open_page: Any) -> None:
    figure = find(open_page, "figure.plot")[0]
    chart = figure.find_element("css selector", "svg")
    press(chart, "right")
    told = figure.find_element("css selector", ".tip").text
    point = figure.find_element("css selector", ".point.on")
    assert told == point.get_attribute("aria-label").strip()
    assert "gen-PPL" in told
    assert "entropy" in told
    lit = find(open_page, "#table tr.here")
    assert [row.get_attribute("data-row") for row in lit] == [point.get_attribute("data-row")]
    press(chart, "enter")
    assert open_page.execute_script("return location.hash") == f"#{point.get_attribute('data-row')}"
    block = find(open_page, f"#{point.get_attribute('data-row')}")[0]
    assert open_page.execute_script("return arguments[0].closest('details').open", block)
    button = figure.find_element("css selector", ".legend button")
    press(button, "enter")
    assert button.get_attribute("aria-pressed") == "false"
    line = button.get_attribute("data-line")
    assert find(figure, f'.line[data-line="{line}"] .point') == find(figure, f'.line[data-line="{line}"] .point.off')


@needs_browser
def test_two_texts_stand_side_by_side_with_their_differences(open_page: Any) -> None:
    assert find(open_page, "#pair-left mark") == []
    box = find(open_page, "#mark")[0]
    press(box, " ")
    marked = [mark.text for mark in find(open_page, "#pair-left mark")]
    other = [mark.text for mark in find(open_page, "#pair-right mark")]
    assert marked
    assert all(text.isdigit() for text in marked + other)  # only the row's number differs
    assert marked != other
    press(find(open_page, "#next")[0], "enter")
    assert "of number 1" in find(open_page, "#pair-left")[0].text
    assert "<script>" in find(open_page, "#pair-left")[0].text


@needs_browser
def test_a_trajectory_moves_with_the_arrow_keys(open_page: Any) -> None:
    player = find(open_page, "details.trace .player")[0]
    slider = player.find_element("css selector", "input")
    text = player.find_element("css selector", ".state")
    assert text.text == "░░░"
    press(slider, "right")
    assert [mark.text for mark in text.find_elements("css selector", "mark")] == ["one "]
    press(slider, "right")
    press(slider, "right")
    assert "zero one </p><script>" in text.text
    assert slider.get_attribute("aria-valuetext") == "after step 4: 1 of 3 tokens changed"


@needs_browser
def test_every_control_has_a_name_and_the_headings_descend(open_page: Any) -> None:
    nameless = """return [...document.querySelectorAll('button, input, select, svg, [role=region]')].filter((e) =>
      !(e.textContent.trim() || e.labels?.length || e.ariaLabel || e.getAttribute('aria-labelledby'))).length"""
    assert open_page.execute_script(nameless) == 0
    levels = open_page.execute_script("return [...document.querySelectorAll('h1,h2,h3,h4')].map((h) => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(after - before for before, after in itertools.pairwise(levels)) <= 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@needs_browser
def test_the_page_fits_its_window_in_both_schemes(open_page: Any, scheme: str, width: int) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    open_page.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    open_page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert open_page.execute_script("return document.documentElement.scrollWidth") <= width
    tall = "return Math.max(...[...document.querySelectorAll('td.why')].map((cell) => cell.offsetHeight))"
    assert open_page.execute_script(tall) < 300  # a sentence, not a letter a line
    ground = open_page.execute_script("return getComputedStyle(document.body).backgroundColor")
    brightness = sum(int(part) for part in ground[4:-1].split(","))
    assert (brightness > 600) == (scheme == "light")
    open_page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_without_javascript_everything_can_be_read(driver: Any, page: str) -> None:
    driver.get("about:blank")
    driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        driver.get(page)
        assert not any(element.is_displayed() for element in find(driver, ".js"))
        assert find(driver, "#table tbody tr[data-row]")[0].is_displayed()
        assert find(driver, "figure.plot svg .point")[0].is_displayed()
        assert find(driver, "details.sequence[open] .card .text")[0].is_displayed()
        assert find(driver, "details.trace[open] .states li")[-1].is_displayed()
        assert find(driver, "#table thead th button") == []
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
