from __future__ import annotations

import json

import pytest
from made_up import PROVENANCE, answered, benched, evaluated, save_run

from elang.report import load_run

SCORES = ("energy", "max_prob", "neg_entropy", "margin")


def changed(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def folder(tmp_path):
    return save_run(tmp_path, answered(), calibration=True, bench=True)


def test_a_run_is_read_back(folder):
    run = load_run(folder)
    assert run.rows == answered()
    assert run.evaluation == evaluated(answered())
    assert run.bench == benched(answered())
    assert run.calibration.score == "energy"


def test_only_the_rows_are_needed(tmp_path):
    assert load_run(save_run(tmp_path, answered(), evaluation=False))[1:] == (None, None, None)


def test_no_rows(tmp_path):
    with pytest.raises(ValueError, match=r"got no rows.json, wanted the folder that `elang eval` wrote into"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["rows.json", "evaluation.json", "calibration.json", "bench.json"])
def test_files_of_another_version_and_broken_ones(folder, name):
    changed(folder / name, version=2)
    with pytest.raises(ValueError, match=rf"{name}: version: Input should be 1; wanted what elang .* writes"):
        load_run(folder)
    for broken, message in ((b'{"version": 1', "the file: Invalid JSON"), (b"\xff\xfe", "codec can't decode")):
        (folder / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
            load_run(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"thresholds": ()}, "thresholds: got none"),
        ({"scores": dict.fromkeys(SCORES, (None,) * 400)}, r"scores\.energy: got no finite value"),
        ({"super_flops": (0,) * 400}, "super_flops: got 0 in all"),
        ({"swift_flops": (0,) * 400}, "swift_flops: got 0 in all"),
    ],
)
def test_rows_that_no_report_can_be_made_of(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_run(save_run(tmp_path, answered(**changes), evaluation=False))


def test_no_rows_in_the_file(tmp_path):
    rows = answered()
    nothing = {name: () for name, value in rows if isinstance(value, tuple) and len(value) == 400}
    nothing |= {"scores": dict.fromkeys(rows.scores, ()), "gate_flops": {}}
    with pytest.raises(ValueError, match="id: got 0 rows"):
        load_run(save_run(tmp_path, rows.model_copy(update=nothing), evaluation=False))


@pytest.mark.parametrize(
    ("name", "field", "other"),
    [
        ("evaluation.json", "score", "max_prob"),
        ("evaluation.json", "temperature", 2.0),
        ("evaluation.json", "task", "mrpc"),
        ("evaluation.json", "data_sha256", "e" * 64),
        ("evaluation.json", "super_sha256", "b" * 64),
        ("calibration.json", "swift_sha256", "6" * 64),
        ("bench.json", "super", "super/other"),
    ],
)
def test_files_of_another_run_are_refused(folder, name, field, other):
    of_provenance = {"provenance": {**PROVENANCE.model_dump(mode="json"), field: other}}
    changed(folder / name, **of_provenance if field.endswith("sha256") else {field: other})
    with pytest.raises(ValueError, match=rf"{name}: {field}: got {other}, wanted .* as in rows.json"):
        load_run(folder)


def test_a_fingerprint_that_was_not_recorded_is_no_mismatch(tmp_path):
    folder = save_run(tmp_path, answered(), calibration=True)
    changed(folder / "calibration.json", provenance={})
    assert load_run(folder).calibration is not None


def test_models_that_take_no_time(folder):
    benched(answered(), costs={"unit": "seconds", "rows": 1, "swift": 0, "super": {1: 1}}).save(folder / "bench.json")
    with pytest.raises(ValueError, match=r"costs: got 0\.0 for a whole batch"):
        load_run(folder)
