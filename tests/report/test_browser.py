"""The page in a real browser: Chromium and its driver, through selenium, where they are installed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from bossnas.report.gather import gather
from bossnas.report.page import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="module")
def browser():
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if CHROMIUM is None or driver is None:
        pytest.skip("no Chromium with its driver on this machine")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = selenium.Chrome(options, selenium.ChromeService(driver))
    yield found
    found.quit()


def show(browser, folder, file):
    file.write_text(page(gather([folder]), "bossnas report x"), encoding="utf-8")
    browser.get("about:blank")
    browser.get_log("performance"), browser.get_log("browser")
    browser.get(file.as_uri())


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("name", ["run", "hostile"])
def test_nothing_is_fetched_and_nothing_complains(browser, request, tmp_path, name):
    show(browser, request.getfixturevalue(name), tmp_path / "page.html")
    assert complaints(browser) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.pwned") is None
    assert browser.execute_script("return document.querySelectorAll('script').length") == 1


def test_sort_filter_and_hover(browser, run, tmp_path):
    show(browser, run, tmp_path / "page.html")
    script = browser.execute_script
    script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    column = "return [...document.querySelectorAll('#block-0-paths tbody tr')].map((row) => row.cells[{}].{})"
    before = script(column.format(0, "textContent"))
    button = "document.querySelectorAll('#block-0-paths th button')[{}].click()"
    for up in (True, False):
        script(button.format(2))
        values = [float(value) for value in script(column.format(2, "dataset.v"))]
        assert values == sorted(values, reverse=not up) and len(values) == 64
        state = script("return document.querySelectorAll('#block-0-paths th')[2].getAttribute('aria-sort')")
        assert state == ("ascending" if up else "descending")
    script(button.format(0))
    assert script(column.format(0, "textContent")) == sorted(before)
    script("const i = document.getElementById('block-0-paths-filter'); i.value = '2 channels, 16';"
           "i.dispatchEvent(new Event('input'))")  # fmt: skip
    shown = script("return [...document.querySelectorAll('#block-0-paths tbody tr')].filter((r) => !r.hidden).length")
    assert 0 < shown < 64 and f"{shown} of 64 shown" in script(
        "return document.getElementById('block-0-paths-count').textContent"
    )
    script("""
        const point = document.querySelectorAll('[data-tip]')[3], box = point.getBoundingClientRect();
        point.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, clientX: box.x, clientY: box.y}));
        """)
    said, tip = script(
        "return [document.querySelectorAll('[data-tip]')[3].dataset.tip, document.getElementById('tip').textContent]"
    )
    assert said == tip and script("return document.getElementById('tip').hidden") is False
    script("""
        const figure = document.querySelector('figure.points');
        for (const key of ['ArrowRight', 'ArrowRight', 'ArrowLeft'])
            figure.dispatchEvent(new KeyboardEvent('keydown', {key: key, bubbles: true}));
        """)
    assert "block 0, layer 0" in script("return document.getElementById('tip').textContent")
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [400, 1400])
def test_it_fits(browser, run, hostile, tmp_path, width):
    for folder in (run, hostile):
        browser.set_window_size(width, 900)
        show(browser, folder, tmp_path / "page.html")
        wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, f"the page is {wide} pixels wider than the window"


def test_axe_finds_no_serious_fault(browser, run, tmp_path):
    axe = os.environ.get("BOSSNAS_AXE")
    if not axe:
        pytest.skip("BOSSNAS_AXE names no axe.min.js (npm install axe-core)")
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})  # of axe alone: the page's own policy bars it
        show(browser, run, tmp_path / "page.html")
        browser.execute_script("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        browser.execute_script(Path(axe).read_text(encoding="utf-8"))
        found = browser.execute_async_script("axe.run().then(arguments[arguments.length - 1])")
        bad = [
            (v["id"], [n["html"][:200] for n in v["nodes"]][:3]) for v in found["violations"] if v["impact"] in SERIOUS
        ]
        assert bad == []
