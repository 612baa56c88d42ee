"""The examples do what their README says: on tiny models, and on a stand-in for what cannot be had here."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import demo_models
import numpy as np
import pytest
from demo_models import TEXTS

import elang
from elang.calibration import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Folders and the file of a calibration that routes half of the texts."""
    folder = tmp_path_factory.mktemp("pair")
    models = {
        "swift": demo_models.save_model(folder / "swift", seed=3, layers=1),
        "super": demo_models.save_model(folder / "super", seed=4),
    }
    made = elang.pipeline("text-classification", **models, router=elang.Router("margin", threshold=0.0))
    scores = np.array([answer["energy"] for answer in made(TEXTS)], dtype=np.float32)
    disagree = [False, True] * (len(TEXTS) // 2)
    calibrate({"margin": scores}, disagree=disagree, swift_share=0.5).save(folder / "calibration.json")
    return {**models, "calibration": str(folder / "calibration.json")}


@pytest.fixture(scope="module")
def wanted(pair):
    answers = elang.pipeline(
        "text-classification", swift=pair["swift"], super=pair["super"], router=pair["calibration"]
    )(TEXTS)
    assert {answer["model"] for answer in answers} == {"swift", "super"}
    return answers


def loaded(path):
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("patched", [False, True])
def test_five_lines_put_a_swift_in_front_of_a_service(pair, wanted, patched, tmp_path, monkeypatch):
    testclient = pytest.importorskip("fastapi.testclient", reason="the extra `serve` is not installed")
    folder = shutil.copytree(EXAMPLES / "fastapi", tmp_path / "service")
    if patched:
        diff = (folder / "elang.diff").read_text()
        assert len(re.findall(r"^\+[^+\n]", diff, re.MULTILINE)) <= 5
        subprocess.run(["patch", "service.py", "elang.diff"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    for name in ("swift", "super", "calibration"):
        monkeypatch.setenv(name.upper(), pair[name])
    reply = testclient.TestClient(loaded(folder / "service.py").app).post("/label", json={"texts": TEXTS})
    if patched:
        assert reply.json() == [answer["label"] for answer in wanted]
    else:
        of_super = elang.pipeline(
            "text-classification",
            swift=pair["swift"],
            super=pair["super"],
            router=elang.Router(threshold=float("inf")),
        )
        assert reply.json() == [answer["label"] for answer in of_super(TEXTS)]


def test_triton_s_python_backend_answers_each_request(pair, wanted, monkeypatch):
    class Tensor:
        def __init__(self, name, values):
            self.name, self.values = name, values

        def as_numpy(self):
            return self.values

    server = types.ModuleType("triton_python_backend_utils")
    server.Tensor = Tensor
    server.InferenceResponse = lambda tensors: {tensor.name: tensor.values for tensor in tensors}
    server.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", server)
    repository = EXAMPLES / "triton" / "model_repository" / "elang"
    parameters = re.findall(r'key: "(\w+)"', (repository / "config.pbtxt").read_text())
    assert set(parameters) == set(pair)
    model = loaded(repository / "1" / "model.py").TritonPythonModel()
    config = {"parameters": {name: {"string_value": value} for name, value in pair.items()}}
    model.initialize(
        {"model_config": json.dumps(config), "model_instance_kind": "CPU", "model_instance_device_id": "0"}
    )
    requests = [
        {"TEXT": Tensor("TEXT", np.array([[text.encode()] for text in part], dtype=object))}
        for part in (TEXTS[:3], TEXTS[3:4], TEXTS[4:])
    ]
    responses = model.execute(requests)
    assert [len(response["LABEL"]) for response in responses] == [3, 1, len(TEXTS) - 4]
    for name, key in (("LABEL", "label"), ("MODEL", "model")):
        got = [value for response in responses for value in response[name].ravel()]
        assert got == [answer[key] for answer in wanted]
    scores = np.concatenate([response["SCORE"].ravel() for response in responses])
    np.testing.assert_allclose(scores, [answer["score"] for answer in wanted], rtol=1e-5)
