from __future__ import annotations

import sys

import numpy as np
import pytest

from elang.calibration import calibrate


@pytest.fixture
def calibration():
    rng = np.random.default_rng(0)
    ease = rng.normal(size=300)
    swift, super_ = rng.random(300) < 0.5 + 0.4 * np.tanh(ease), rng.random(300) < 0.85
    scores = {"random": rng.random(300), "ease": ease, "doubled": 2 * ease}
    return calibrate(scores, swift, super_, swift_share=0.4, provenance={"data": "made up"})


def test_plot_shows_the_curves_the_controls_and_the_chosen_point(calibration):
    axes = calibration.plot().axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    c = calibration
    for label, name in (("ease = doubled", "ease"), ("random", "random")):
        assert np.array_equal(lines[label], np.stack([c.curves[name].share_kept, c.curves[name].accuracy], axis=1))
    assert lines["random routing (expected)"].tolist() == [[0, c.super_accuracy], [1, c.swift_accuracy]]
    chosen = [xy for label, xy in lines.items() if label.startswith("chosen")]
    assert chosen[0].tolist() == [[c.target.share_kept, c.target.accuracy]]
    texts = " ".join(text.get_text() for text in axes.texts)
    assert f"Super {c.super_accuracy:.1%}" in texts
    assert f"Swift {c.swift_accuracy:.1%}" in texts
    assert axes.get_title(loc="left") == "made up (n = 300)"
    assert axes.get_xlabel() == "share of rows kept by Swift"


def test_the_legend_has_every_curve_and_fits_however_many_scores_rank_alike():
    rng = np.random.default_rng(0)
    ease, other = rng.normal(size=300), rng.random(300)
    swift, super_ = rng.random(300) < 0.5 + 0.4 * np.tanh(ease), rng.random(300) < 0.85
    names = ("energy_probs", "energy_centered", "max_prob", "neg_entropy", "margin")
    scores = {f"{name}{at}": ease for at in ("", "@2", "@3") for name in names}
    chosen = calibrate({**scores, "energy": other}, swift, super_, score="margin@2", swift_share=0.4)
    figure = chosen.plot()
    figure.draw_without_rendering()
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert any(label.startswith("margin@2 = energy_probs = ") and label.endswith(" and 10 more") for label in labels)
    assert "energy" in labels
    width = figure.bbox.width
    assert all(text.get_window_extent().x1 <= width for text in legend.get_texts())


def test_plot_is_written_in_the_format_of_its_suffix(calibration, tmp_path):
    calibration.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    calibration.plot(str(tmp_path / "curve.svg"))
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_without_matplotlib_the_extra_is_named(calibration, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'elang\[report\]'"):
        calibration.plot()
