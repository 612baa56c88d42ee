"""The page in headless Chromium, of Debian's `chromium` or any other on the path."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from made_up import COSTS, answered, save_run

from elang.report import charts, load_run, operating_points, page

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
if CHROMIUM is None:
    pytest.skip(f"no browser: none of {', '.join(NAMES)} on the path", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright to drive the browser")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return load_run(save_run(tmp_path_factory.mktemp("run"), answered(3), calibration=True, bench=True))


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    points = operating_points(run.rows)
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page(run, points, charts(run, points)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def opened(report):
    """The page, what it said to the console, and what it asked of the network."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab, said, asked = browser.new_page(color_scheme="light"), [], []
        tab.on("console", lambda message: said.append(message.text))
        tab.on("pageerror", lambda error: said.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(report)
        yield tab, said, asked
        browser.close()


@pytest.fixture
def tab(opened, report):
    tab, said, asked = opened
    yield tab
    assert said == []
    assert asked == [report]


def drawn(tab):
    """After the frame in which the slider's figures are drawn."""
    tab.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def text(tab, name):
    (said,) = set(tab.locator(f"[data-text='{name}']").all_text_contents())
    return said


def trace(tab, figure, name):
    return tab.evaluate(
        "([figure, name]) => { const {x, y} = document.getElementById(figure).data.find(t => t.name === name);"
        "return {x: [...x], y: [...y]}; }",
        [figure, name],
    )


def assert_shows(tab, rows, threshold):
    """Every figure and marker, computed row by row."""
    score, swift, super_ = rows.score_values("energy"), np.array(rows.swift_right), np.array(rows.super_right)
    kept = np.isfinite(score) & (score >= np.float32(threshold))
    right, share, n = np.where(kept, swift, super_), kept.mean(), len(score)
    flops = np.where(kept, 0, rows.super_flops).sum() + sum(rows.swift_flops)
    speedup = COSTS.super[8] / 8 / COSTS.of_share(1 - share)[0]
    expected = {
        "threshold": str(np.float32(threshold)),
        "share_kept": f"{share:.1%}",
        "accuracy": f"{right.mean():.1%}",
        "random_accuracy": f"{share * swift.mean() + (1 - share) * super_.mean():.1%}",
        "flops_speedup": f"{sum(rows.super_flops) / flops:.2f}x",
        "time_speedup": f"{speedup:.2f}x",
        "kept": str(kept.sum()),
        "routed": str(n - kept.sum()),
        "kept_wrong": str((kept & ~swift).sum()),
        "wrong": str((~right).sum()),
    }
    assert {name: text(tab, name) for name in expected} == expected
    assert tab.locator("#position").get_attribute("aria-valuetext") == expected["threshold"]
    for i, label in enumerate(rows.labels):
        of = np.array(rows.target) == label
        assert (text(tab, f"joint of {i}"), text(tab, f"kept of {i}")) == (
            f"{right[of].mean():.1%}",
            f"{kept[of].mean():.1%}",
        )
    for figure, x in (("flops", flops / sum(rows.super_flops)), ("time", 1 / speedup), ("curves", share)):
        point = trace(tab, figure, "operating point")
        assert (point["x"][0], point["y"][0]) == pytest.approx((x, right.mean()))
    for name, of in (
        ("kept, Swift right", kept & swift),
        ("kept, Swift wrong", kept & ~swift),
        ("routed", ~kept & np.isfinite(score)),
    ):
        bars = trace(tab, "histogram", name)
        assert sum(bars["y"]) == of.sum()
        assert np.dot(bars["x"], bars["y"]) == pytest.approx(score[of].sum(), abs=0.01 * n)
    finite = score[np.isfinite(score)]
    line = np.clip(threshold, finite.min(), finite.max())
    assert trace(tab, "histogram", "threshold")["x"] == pytest.approx([line, line])
    for id_, shown in tab.locator(".examples li").evaluate_all(
        "items => items.map(item => [item.lastElementChild.textContent.split(':')[0], item.checkVisibility()])"
    ):
        row = rows.id.index(id_)
        assert shown == (kept[row] if not swift[row] else not kept[row])


def test_the_slider_moves_the_figures_and_the_markers(tab, run):
    rows, points = run.rows, operating_points(run.rows)
    assert_shows(tab, rows, rows.thresholds[0])
    slider = tab.get_by_label("Threshold")
    slider.focus()
    for keys, position in ((["Home"], 0), (["ArrowRight"] * 3, 3), (["End", "ArrowLeft"], 199)):
        for key in keys:
            tab.keyboard.press(key)
        drawn(tab)
        assert slider.input_value() == str(position)
        assert_shows(tab, rows, points.threshold[position])
    slider.fill("100")
    drawn(tab)
    assert_shows(tab, rows, points.threshold[100])


def test_the_text_of_rows_is_text(tab):
    assert tab.title() == "sst2: Swift in front of Super"
    assert "</script><script>document.title" in tab.locator(".examples li p").first.text_content()


@pytest.mark.parametrize("width", [1280, 375])
def test_nothing_is_wider_than_the_screen(tab, width, tmp_path):
    tab.set_viewport_size({"width": width, "height": 800})
    tab.wait_for_function(
        "() => [...document.querySelectorAll('.plot')].every("
        "plot => Math.abs(plot.clientWidth - plot.querySelector('.main-svg').getBoundingClientRect().width) < 1)"
    )
    wide = "box => box.scrollWidth > box.clientWidth"
    assert not tab.evaluate(f"() => ({wide})(document.documentElement)")
    boxes = tab.locator(".table, figure, .plot")
    assert boxes.count() >= 12
    assert not any(boxes.evaluate_all(f"boxes => boxes.map({wide})"))
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_dark(tab):
    def colors():
        drawn(tab)
        return tab.evaluate(
            "() => [getComputedStyle(document.body).backgroundColor, document.querySelector('.plot').layout.font.color]"
        )

    light = colors()
    tab.emulate_media(color_scheme="dark")
    dark = colors()
    assert light == ["rgb(255, 255, 255)", "#1a1d21"]
    assert dark == ["rgb(20, 23, 28)", "#e6e9ee"]
