"""The pair on a local Ray: what it answers from many clients, what a Super that fails or dies does, and recovery."""

from __future__ import annotations

import asyncio
import json
import random
import re
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import AsyncMock, Mock

import demo_models
import numpy as np
import pytest
import torch
from demo_models import TEXTS

import elang
from elang.calibration import calibrate
from elang.fingerprint import fingerprint

pytest.importorskip("ray.serve", reason="the extra `serve-ray` is not installed")

import httpx
import ray
import yaml
from fastapi import HTTPException
from pydantic import ValidationError
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema
from serve.fake_pair import LIMIT, until
from transformers import AutoConfig

from elang.serve import Busy, Closed, ray_app
from elang.serve.ray_app import Settings, Super, Swift, app
from elang.super_model import SuperModel

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_serve" / "config.yaml"
NAN_WORD = "joke"
SMALL = {"ray_actor_options": {"num_cpus": 0.1}}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster():
    """Addresses of Ray's HTTP proxy, on loopback, and of its metrics. Ray's own ports ask for the token."""
    ports = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
        patch.setenv("OMP_NUM_THREADS", "1")
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _metrics_export_port=ports[1],
            _system_config={"metrics_report_interval_ms": 500},
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": ports[0]})
            yield tuple(f"http://127.0.0.1:{port}" for port in ports)
        finally:
            serve.shutdown()
            ray.shutdown()


class Pair:
    """Folders of the models, a calibration of them, and what `elang.pipeline` answers."""

    def __init__(self, folder):
        self.folder = folder
        self.models = {
            "swift": demo_models.save_model(folder / "swift", seed=3, layers=1),
            # Its labels are Swift's in another order and case.
            "super": demo_models.save_model(folder / "super", labels=("Good", "Bad"), seed=4),
        }
        router = elang.Router("margin", threshold=0.0)
        joint = elang.pipeline("text-classification", **self.models, router=router)
        scores = np.array([answer["energy"] for answer in joint(TEXTS)])
        # In the widest gap of the middle: batches of other sizes round otherwise.
        middle = np.sort(scores)[len(TEXTS) // 3 : -len(TEXTS) // 3]
        self.threshold = float(middle[:-1][np.diff(middle).argmax()] + np.diff(middle).max() / 2)
        models = {"swift": joint.swift.reader.model, "super": joint.super_.model}
        made = calibrate(
            {"margin": scores.tolist()},
            disagree=[False, True] * (len(TEXTS) // 2),
            swift_share=0.5,
            provenance={f"{name}_sha256": fingerprint(model) for name, model in models.items()},
        )
        self.calibration = str(folder / "calibration.json")
        made.save(self.calibration)
        router.set_threshold(self.threshold)
        self.due = dict(zip(TEXTS, joint(TEXTS), strict=True))
        router.set_threshold(float("-inf"))
        self.swift_s = dict(zip(TEXTS, joint(TEXTS), strict=True))
        self.routed = [text for text in TEXTS if self.due[text]["model"] == "super"]
        self.kept = [text for text in TEXTS if self.due[text]["model"] == "swift"]

    def settings(self, **options):
        return {**self.models, "score": "margin", "threshold": self.threshold, **options}

    def check(self, texts, answers, degraded=()):
        """Every text has its own answer, by the model that it is due; the degraded ones Swift's."""
        assert len(answers) == len(texts)
        for text, answer in zip(texts, answers, strict=True):
            wanted = (self.swift_s if text in degraded else self.due)[text]
            assert (answer["model"], answer["degraded"]) == (wanted["model"], text in degraded), text
            assert answer["label"] == wanted["label"].capitalize()
            assert list(answer["probabilities"]) == ["Good", "Bad"]
            assert answer["probabilities"][answer["label"]] == pytest.approx(wanted["score"], abs=1e-5)
            assert answer["score"] == pytest.approx(wanted["energy"], abs=1e-5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return Pair(tmp_path_factory.mktemp("pair"))


def faulty(folder):
    """The deployment `Super` whose model does what `fault` says and whose batches are noted."""

    class Faulty(Super.func_or_class):
        def __init__(self, settings, router):
            super().__init__(settings, router)
            model, nan_word = self._model.model, self._rows.reader.tokenizer.convert_tokens_to_ids(NAN_WORD)

            def call(input_ids, **inputs):
                end = time.monotonic() + LIMIT
                while (fault := (folder / "fault").read_text()) == "hang" and time.monotonic() < end:
                    time.sleep(0.01)
                if fault == "raise":
                    raise RuntimeError("no")
                if fault == "oom" and len(input_ids) == self.rows > 1:
                    raise MemoryError
                logits = model(input_ids=input_ids, **inputs).logits
                if fault == "nan":
                    logits[(input_ids == nan_word).any(dim=1)] = torch.nan
                return logits[:, :1] if fault == "shape" else logits

            self._model = replace(self._model, model=call)

        def _guesses(self, texts):
            self.rows = len(texts)
            with open(folder / "batches", "a") as batches:
                batches.write(json.dumps(texts) + "\n")
            return super()._guesses(texts)

    return serve.deployment(Faulty, name="Super", max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0.1})


class Service:
    """A client of a Swift, and what its Super does."""

    def __init__(self, url, folder):
        self.client, self.folder = httpx.Client(base_url=url, timeout=LIMIT), folder

    def post(self, text, **options):
        return self.client.post("/classify", json={"text": text, **options})

    def answers(self, text, **options):
        reply = self.post(text, **options)
        assert reply.status_code == 200, reply.text
        return reply.json()["answers"]

    def fault(self, fault):
        made = self.folder / "fault.new"
        made.write_text(fault)
        made.replace(self.folder / "fault")

    @property
    def batches(self):
        return [json.loads(line) for line in (self.folder / "batches").read_text().splitlines()]

    def wait_until_asked(self, text):
        until(lambda: any(text in batch for batch in self.batches))


@pytest.fixture(scope="module")
def apart(cluster, pair, tmp_path_factory):
    """Two replicas of Swift that fall back on their own answers."""
    folder = tmp_path_factory.mktemp("apart")
    service = Service(f"{cluster[0]}/apart", folder)
    service.fault("")
    settings, router = Settings(**pair.settings()), elang.Router("margin", threshold=pair.threshold)
    swift = Swift.options(num_replicas=2, health_check_period_s=1.0, **SMALL)
    serve.run(swift.bind(settings, router, faulty(folder).bind(settings, router)), name="apart", route_prefix="/apart")
    return service


@pytest.fixture
def strict(cluster, pair, apart):
    """Another Swift of the same Super, which fails where Super does."""
    if "strict" not in serve.status().applications:
        settings, router = Settings(**pair.settings(on_super_error="raise")), elang.Router("margin", threshold=0.0)
        # Its threshold is moved as it starts.
        swift = Swift.options(user_config={"threshold": pair.threshold}, **SMALL)
        super_ = serve.get_deployment_handle("Super", "apart")
        serve.run(swift.bind(settings, router, super_), name="strict", route_prefix="/strict")
    return Service(f"{cluster[0]}/strict", apart.folder)


@pytest.fixture(autouse=True)
def _no_fault(request):
    if "apart" in request.fixturenames:
        service = request.getfixturevalue("apart")
        (service.folder / "batches").write_text("")
        yield
        service.fault("")
    else:
        yield


def settled(read):
    """What is read once it stays: Ray's metrics come in time."""
    last = None
    while (now := read()) != last:
        last = now
        time.sleep(1.5)  # of three reports
    return now


def until_running(name):
    end = time.monotonic() + 3 * LIMIT
    while (application := serve.status().applications[name]).status != "RUNNING":
        assert application.status != "DEPLOY_FAILED" and time.monotonic() < end, application  # noqa: PT018
        time.sleep(0.05)


def replicas(deployment):
    prefix = f"SERVE_REPLICA::{deployment}#"
    names = (actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    return sorted(name for name in names if name.startswith(prefix))


# ---- what it answers


def test_many_clients_each_get_their_own_answers(apart, pair):
    def ask(seed):
        shuffled = random.Random(seed)
        for _ in range(4):
            texts = shuffled.choices(TEXTS, k=shuffled.randint(1, 6))
            pair.check(texts, apart.answers(texts))

    assert min(len(pair.routed), len(pair.kept)) > 10
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(16)))
    asked = [text for batch in apart.batches for text in batch]
    assert set(asked) <= set(pair.routed), "Super saw a row that Swift keeps"
    assert max(map(len, apart.batches)) > 1


def test_a_batch_of_super_is_of_several_swifts(apart, strict, pair):
    first, *texts = pair.routed[:13]
    here, there = texts[:6], texts[6:]
    apart.fault("hang")
    with ThreadPoolExecutor(13) as pool:
        calls = [pool.submit(apart.answers, first)]
        apart.wait_until_asked(first)
        calls += [pool.submit(apart.answers, text) for text in here]
        calls += [pool.submit(strict.answers, text) for text in there]
        time.sleep(1.0)  # for them to arrive
        apart.fault("")
        for text, call in zip([first, *texts], calls, strict=True):
            pair.check([text], call.result())
    assert any(set(batch) & set(here) and set(batch) & set(there) for batch in apart.batches)


def test_both_models_in_one_replica(cluster, pair):
    """By a config, which then moves the threshold of the replica that serves."""
    service = Service(f"{cluster[0]}/together", None)

    def deploy(**deployment):
        config = {
            "name": "together",
            "route_prefix": "/together",
            "import_path": "elang.serve.ray_app:app",
            "args": {**pair.settings(), "threshold": str(pair.threshold), "together": "true"},  # as `serve run` has it
            "deployments": [{"name": "Swift", **SMALL, **deployment}],
        }
        client = serve.context._get_global_client()
        client.deploy_apps(ServeDeploySchema(applications=[config]))  # what `serve deploy` does
        until_running("together")

    deploy()
    pair.check(TEXTS, service.answers(TEXTS))
    before = replicas("together#Swift")
    deploy(user_config={"threshold": "-inf"})
    until(lambda: {answer["model"] for answer in service.answers(TEXTS)} == {"swift"})
    assert replicas("together#Swift") == before
    serve.delete("together")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "JSON decode error"),
        (b'{"text": {"secret": 1}}', 422, "valid string"),
        (b'{"text": []}', 422, "at least 1 item"),
        (b'{"text": "secret", "txet": "2"}', 422, "Extra inputs"),
        (b'{"text": "secret", "deadline_ms": 0}', 422, "greater than 0"),
        (b'{"text": "\\ud800"}', 422, "unicode|string"),
        (b'{"text": "' + b"7" * 20_001 + b'"}', 422, "at most 20000 characters"),
        (b'{"text": "' + b"7" * (1 << 20) + b'"}', 413, "more than 1048576 bytes"),
    ],
)
def test_what_is_no_request_is_told_so(apart, body, status, message):
    reply = apart.client.post("/classify", content=body, headers={"Content-Type": "application/json"})
    assert (reply.status_code, bool(re.search(message, reply.text))) == (status, True), reply.text
    assert "secret" not in reply.text


@pytest.mark.parametrize("error", [Busy("full"), Closed("over"), BackPressureError(4096, 4096)])
def test_no_room_is_a_503_that_says_when_to_come_again(error):
    async def answer(texts, deadline):
        raise error

    replica = SimpleNamespace(_pair=SimpleNamespace(answer=answer), _deadline=None, _seconds=Mock())
    with pytest.raises(HTTPException) as refused:
        asyncio.run(Swift.func_or_class.classify(replica, ray_app.Texts(text="7")))
    assert (refused.value.status_code, refused.value.headers) == (503, {"Retry-After": "1"})


# ---- faults of Super


@pytest.mark.parametrize(("fault", "name"), [("raise", "RuntimeError"), ("shape", "_UnfitShape")])
def test_a_super_that_fails(apart, strict, pair, fault, name):
    texts = [*pair.routed[:3], *pair.kept[:3]]
    apart.fault(fault)
    pair.check(texts, apart.answers(texts), degraded=pair.routed)
    reply = strict.post(texts)
    assert (reply.status_code, reply.json()) == (502, {"detail": f"a model failed: {name}"})
    pair.check(pair.kept[:3], strict.answers(pair.kept[:3]))
    apart.fault("")
    pair.check(texts, apart.answers(texts))
    pair.check(texts, strict.answers(texts))


def test_a_row_that_is_no_number_fails_alone(apart, strict, pair):
    bad, good = [], []
    for text in pair.routed:
        (bad if NAN_WORD in text else good).append(text)
    assert bad
    apart.fault("nan")
    pair.check(pair.routed, apart.answers(pair.routed), degraded=bad)
    assert any(set(batch) & set(bad) and set(batch) & set(good) for batch in apart.batches)
    assert strict.post(bad).status_code == 502
    pair.check(good, strict.answers(good))


def test_out_of_memory_is_tried_in_halves(apart, pair):
    apart.fault("oom")
    answers = apart.answers(pair.routed)
    alone = [batch[0] for batch in apart.batches if len(batch) == 1]  # has no halves
    pair.check(pair.routed, answers, degraded=[text for text in alone if answers[pair.routed.index(text)]["degraded"]])
    assert len(alone) < len(pair.routed)


def test_a_deadline_is_kept_by_swift_and_a_super_that_hung_serves_again(apart, strict, pair):
    text = pair.routed[0]
    apart.fault("hang")
    for service in (apart, strict):  # whatever becomes of errors
        pair.check([text], service.answers(text, deadline_ms=300), degraded=[text])
    apart.fault("")
    pair.check([text], strict.answers(text))


class Handle:
    """Of a Super that never answers, or is not there yet."""

    def __init__(self, config):
        self.cancelled = 0
        self.config = SimpleNamespace(remote=AsyncMock(return_value=config))
        self.answer = SimpleNamespace(remote=lambda text: self)

    def __await__(self):
        return asyncio.sleep(LIMIT).__await__()

    def cancel(self):
        self.cancelled += 1


@pytest.mark.parametrize(("super_timeout", "seconds"), [(0.05, None), (None, 0.05), (LIMIT, 0.05), (0.05, LIMIT)])
def test_a_super_that_hangs_times_out_and_is_told(pair, super_timeout, seconds):
    settings, router = Settings(**pair.settings(super_timeout=super_timeout)), elang.Router("margin", threshold=0.0)
    handle = Handle(None)

    async def ask():
        config = AutoConfig.from_pretrained(pair.models["super"])
        replica = ray_app.Apart(settings, router, handle, config)
        await replica._ask_super("7", None if seconds is None else time.monotonic() + seconds)

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(ask())
    assert handle.cancelled == 1


def test_a_super_that_is_killed_comes_back_and_nothing_is_lost(apart, strict, pair):
    swifts, (dead,) = replicas("apart#Swift"), replicas("apart#Super")
    first, second = pair.routed[:2]
    apart.fault("hang")
    with ThreadPoolExecutor(2) as pool:
        here, there = pool.submit(apart.answers, first), pool.submit(strict.post, second)
        until(lambda: apart.batches)
        time.sleep(1.0)  # for the other one to wait there, too
        ray.kill(ray.get_actor(dead, namespace="serve"))
        apart.fault("")
        pair.check([first], here.result(), degraded=[first])
        assert there.result().status_code == 502
    texts = [*pair.kept[:2], first]
    pair.check(texts, strict.answers(texts))
    pair.check(texts, apart.answers(texts))
    assert replicas("apart#Swift") == swifts
    assert dead not in replicas("apart#Super")


def test_a_service_that_ends_answers_first(apart, strict, pair):
    text = pair.routed[0]
    apart.fault("hang")
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(strict.answers, text)
        apart.wait_until_asked(text)
        leaving = pool.submit(serve.delete, "strict")
        until(lambda: serve.status().applications["strict"].status == "DELETING")
        assert not call.done()
        apart.fault("")
        pair.check([text], call.result())
        leaving.result()
    assert "strict" not in serve.status().applications


def test_calls_of_super_that_hang_make_its_replica_unhealthy():
    over = threading.Event()
    model = SuperModel(lambda **inputs: over.wait(LIMIT), timeout=0.01)
    check_health = partial(Super.func_or_class.check_health, SimpleNamespace(_model=model))
    with pytest.raises(TimeoutError):
        model({}, 1, 2, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="1 calls"):
        asyncio.run(check_health())
    over.set()
    until(lambda: not model.late.count())
    asyncio.run(check_health())


def test_metrics_have_the_names_of_elang_prometheus(cluster, apart, pair):
    def samples(name, **tags):
        tags = {"application": "apart", **tags}
        pattern = "".join(f'(?=.*{key}="{value}")' for key, value in tags.items())
        lines = re.findall(rf"^ray_{name}\{{{pattern}.*\}} (\S+)$", httpx.get(f"{cluster[1]}/metrics").text, re.M)
        return list(map(float, lines))

    def counts():
        swift, super_ = {"deployment": "Swift"}, {"deployment": "Super"}
        rows = (sum(samples("elang_rows_total", route=route, **swift)) for route in ("super", "swift"))
        degraded = sum(samples("elang_degraded_rows_total", **swift))
        requests = sum(samples("elang_route_seconds_count", **swift))
        return [*rows, degraded, requests, sum(samples("elang_super_bucket_total", size="1", **super_))]

    apart.answers(pair.routed[0])
    apart.answers(pair.kept[0])
    before = settled(counts)
    apart.answers([pair.routed[1], *pair.kept[:3]])
    apart.fault("raise")
    apart.answers(pair.routed[0])
    until(lambda: np.subtract(counts(), before).tolist() == [2, 3, 1, 2, 2])
    until(lambda: pytest.approx(pair.threshold) in samples("elang_threshold_info", score="margin"))


# ---- what cannot start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, "wanted either"),
        ({"calibration": "calibration.json"}, "wanted either"),
        ({"threshold": None, "calibration": "calibration.json", "score": "energy"}, "wanted either"),
        ({"on_super_error": "cry"}, "on_super_error"),
        ({"super_timeout": 0}, "super_timeout"),
        ({"max_batch": 0}, "max_batch"),
        ({"replicas": 2}, "replicas"),
    ],
)
def test_settings_that_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Settings(swift="swift", super="super", **{"threshold": 1.0, **change})


def test_a_calibration_is_read_where_the_application_is_built(tmp_path):
    models = {"swift": "swift", "super": "super"}
    with pytest.raises(FileNotFoundError):
        app(Settings(**models, calibration=str(tmp_path / "none.json")))
    with pytest.raises(ValueError, match="score: got 'logits'"):
        app(Settings(**models, score="logits", threshold=1.0))


def test_labels_that_do_not_match_are_told_at_the_start(pair, tmp_path):
    other = demo_models.save_model(tmp_path / "other", labels=("no", "yes"), seed=3, layers=1)
    handle, router = Handle(AutoConfig.from_pretrained(pair.models["super"])), elang.Router("margin", threshold=0.0)
    start = partial(Swift.func_or_class.__init__, SimpleNamespace(), router=router, super_=handle)
    with pytest.raises(ValueError, match=r"label_map: got None, wanted one, as Swift's labels are \['no', 'yes'\]"):
        asyncio.run(start(Settings(**pair.settings(swift=other))))


def test_models_that_the_calibration_is_not_of_are_told_at_the_start(pair, tmp_path):
    calibration = elang.Calibration.load(pair.calibration)
    Super.func_or_class(Settings(**pair.models, calibration=pair.calibration), calibration)
    other = demo_models.save_model(tmp_path / "other", labels=("Good", "Bad"), seed=5)
    with pytest.raises(ValueError, match="super_: got other weights than the calibration was made with"):
        Super.func_or_class(Settings(swift="swift", super=other, calibration=pair.calibration), calibration)


# ---- the example


def test_the_example_is_a_config_of_ray_s():
    config = ServeDeploySchema(**yaml.safe_load(EXAMPLE.read_text()))
    (application,) = config.applications
    assert application.import_path == "elang.serve.ray_app:app"
    Settings(**application.args)
    assert {deployment.name for deployment in application.deployments} == {"Swift", "Super"}
