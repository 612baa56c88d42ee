"""The service of a batcher: what it answers, what it refuses and how, and that nothing sent to it is a server error."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import demo_models
import pytest
import torch
from demo_models import TEXTS
from typer.testing import CliRunner

import elang
from elang.calibration import Calibration, calibrate
from elang.cli import app as command_line
from elang.fingerprint import fingerprint

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import httpx
import schemathesis
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from opentelemetry import trace
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serve.fake_pair import LIMIT, FakePair, Ids, of_super, of_swift, until

from elang.serve.app import create_app
from elang.serve.schemas import Limits

pytestmark = pytest.mark.usefixtures("one_thread")
TOKEN = "a token"


class Digits(Ids):
    """Texts of digits stand for the rows of the fake pair."""

    def check(self, rows):
        for row in rows:
            if not row.isascii() or not row.isdigit() or not 0 < int(row) < 8192:
                raise ValueError(f"rows: got {row!a}, wanted digits")

    def __call__(self, rows):
        return super().__call__([int(row) for row in rows])


@contextmanager
def served(*, limits=None, token=TOKEN, reload=None, **options):
    """A client of the service, and the pair behind it."""
    pair = FakePair(**options)
    pair.batcher._pair._rows = pair.batcher._pair._super_rows = Digits()
    app = create_app(pair.batcher, warm_up=["1"], limits=limits, token=token, reload=reload)
    with pair, TestClient(app, raise_server_exceptions=False) as client:
        yield client, pair


def same(answer, wanted):
    assert (answer["label"], answer["model"], answer["degraded"]) == wanted[:3]
    assert answer["score"] == pytest.approx(wanted.score, abs=1e-5)
    assert list(answer["probabilities"].values()) == pytest.approx(wanted.probabilities, abs=1e-5)
    assert list(answer["probabilities"]) == ["LABEL_0", "LABEL_1"]


# ---- what it answers


def test_a_text_and_a_list_of_texts():
    with served() as (client, _):
        reply = client.post("/classify", json={"text": ["3", "7", "9"]})
        assert reply.status_code == 200
        for answer, wanted in zip(reply.json()["answers"], (of_super(3), of_swift(7), of_super(9)), strict=True):
            same(answer, wanted)
        (answer,) = client.post("/classify", json={"text": "7"}).json()["answers"]
        same(answer, of_swift(7))


def test_a_score_that_is_not_finite_is_null():
    with served() as (client, pair):
        pair.swift.fault = lambda ids: torch.full((len(ids), 2), torch.nan)
        (answer,) = client.post("/classify", json={"text": "3"}).json()["answers"]
    assert answer["score"] is None
    assert answer["model"] == "super"


def test_a_deadline_is_kept_by_swift():
    with served(limits=Limits(deadline=None)) as (client, pair):
        pair.super.gate.clear()
        pair.clock.time += 1

        def late():
            pair.super.wait_until_called()
            pair.clock.time += 60

        pair.super._entered.acquire(blocking=False)  # of the warm-up
        timer = threading.Thread(target=late)
        timer.start()
        (answer,) = client.post("/classify", json={"text": "3", "deadline_ms": 5000}).json()["answers"]
        timer.join()
        same(answer, of_swift(3, degraded=True))
        pair.super.gate.set()


def test_the_service_s_own_deadline_holds_for_requests_that_name_none(monkeypatch):
    asked = []
    with served(limits=Limits(deadline=2.5)) as (client, pair):
        submit = pair.batcher.submit
        monkeypatch.setattr(pair.batcher, "submit", lambda rows, deadline: asked.append(deadline) or submit(rows))
        client.post("/classify", json={"text": "7"})
        client.post("/classify", json={"text": "7", "deadline_ms": 10})
    assert asked == [2.5, 0.01]


def test_ready_from_the_warm_up_to_the_end():
    pair = FakePair()
    pair.batcher._pair._rows = pair.batcher._pair._super_rows = Digits()
    app = create_app(pair.batcher, warm_up=["1", "2"])
    with pair:
        before = TestClient(app)
        assert before.get("/readyz").status_code == 503
        assert before.get("/healthz").status_code == 200
        threshold = pair.batcher.router.threshold.item()
        with TestClient(app) as client:
            assert client.get("/readyz").json() == {"status": "ready"}
            assert pair.super.batches == [[1, 2]]
            assert pair.swift.batches == [[1, 2], [1, 2]]
            assert pair.batcher.router.threshold.item() == threshold
        assert before.get("/readyz").status_code == 503
        assert before.get("/healthz").status_code == 503
        assert before.post("/classify", json={"text": "7"}).status_code == 503


def test_metrics_are_of_the_batcher():
    with served(queue_rows=5) as (client, _):
        client.post("/classify", json={"text": ["3", "7", "8"]})
        assert client.post("/classify", json={"text": ["7"] * 6}).status_code == 422
        text = client.get("/metrics").text
    assert 'elang_rows_total{model="service",route="swift"} 3.0' in text  # one of the warm-up
    assert 'elang_rows_total{model="service",route="super"} 2.0' in text
    assert 'elang_route_seconds_count{model="service"} 2.0' in text
    assert 'elang_threshold_info{model="service",score="energy"} 5.0' in text
    assert 'elang_unanswered_rows_total{model="service",reason="busy"} 0.0' in text
    assert 'elang_waiting_rows{for="super",model="service"} 0.0' in text


def test_a_span_says_how_many_rows_were_routed(monkeypatch):
    seen = {}

    class Span:
        def set_attribute(self, name, value):
            seen[name] = value

    class Tracer:
        @contextmanager
        def start_as_current_span(self, name, attributes):
            seen.update(attributes, name=name)
            yield Span()

    monkeypatch.setattr(trace, "get_tracer", lambda name: Tracer())
    with served() as (client, _):
        client.post("/classify", json={"text": ["3", "7", "9"]})
    assert seen == {"name": "elang.classify", "elang.rows": 3, "elang.routed": 2, "elang.degraded": 0}


# ---- what it refuses


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 422, "JSON decode error"),
        (b"[]", 422, "valid dictionary"),
        (b'{"text": 7}', 422, "valid string"),
        (b'{"text": []}', 422, "at least 1 item"),
        (b'{"text": ["1", "2", "3", "4"]}', 422, "at most 3 items"),
        (b'{"text": "12345678"}', 422, "at most 7 characters"),
        (b'{"text": ["1", "12345678"]}', 422, "at most 7 characters"),
        (b'{"text": "1", "txet": "2"}', 422, "Extra inputs"),
        (b'{"text": "1", "deadline_ms": 0}', 422, "greater than 0"),
        (b'{"text": "1", "deadline_ms": NaN}', 422, "less than or equal"),
        (b'{"text": "\\ud800"}', 422, "unicode|string"),
        (b'{"text": "seven"}', 422, "wanted digits"),
        (b'{"text": "' + b"7" * 300 + b'"}', 413, "more than 200 bytes"),
    ],
)
def test_what_is_no_request_is_told_so(body, status, message):
    with served(limits=Limits(texts=3, characters=7, bytes=200)) as (client, _):
        for content in (body, iter([body[:5], body[5:]])):  # of a known length and in chunks
            reply = client.post("/classify", content=content, headers={"Content-Type": "application/json"})
            assert (reply.status_code, bool(re.search(message, reply.text))) == (status, True), reply.text
        assert client.post("/classify", json={"text": "7"}).status_code == 200


def test_what_was_sent_is_not_sent_back():
    with served() as (client, _):
        assert "secret" not in client.post("/classify", json={"text": {"secret": 1}}).text


def test_no_room_is_a_503_that_says_when_to_come_again():
    with served(queue_rows=2) as (client, pair):
        pair.super.gate.clear()
        held = pair.batcher.submit(["3", "6"])
        reply = client.post("/classify", json={"text": ["7", "8"]})
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
        pair.super.gate.set()
        held.result(LIMIT)
        assert client.post("/classify", json={"text": ["7", "8"]}).status_code == 200


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_model_that_fails_is_a_502_and_serves_again(error):
    def fail(ids):
        raise error("no")

    with served() as (client, pair):
        pair.super.fault = fail
        reply = client.post("/classify", json={"text": ["3", "7"]})
        assert (reply.status_code, reply.json()) == (502, {"detail": f"a model failed: {error.__name__}"})
        assert client.post("/classify", json={"text": "7"}).status_code == 200
        pair.super.fault = None
        assert client.post("/classify", json={"text": "3"}).status_code == 200


def test_a_client_that_goes_away_takes_its_rows_along():
    pair = FakePair()
    pair.batcher._pair._rows = pair.batcher._pair._super_rows = Digits()
    app = create_app(pair.batcher, warm_up=["1"])
    body = json.dumps({"text": ["3", "7"]}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/classify",
        "raw_path": b"/classify",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
    }
    sent = []

    async def send(message):
        sent.append(message)

    async def leave():
        left, messages = asyncio.Event(), [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        call = asyncio.ensure_future(app(scope, receive, send))
        await asyncio.to_thread(pair.super.wait_until_called)
        assert not call.done()
        left.set()
        await call

    with pair:
        pair.super.gate.clear()
        asyncio.run(leave())
        until(lambda: pair.batcher.stats.cancelled == 2)
        assert pair.batcher.stats.held == 0


# ---- the threshold


def test_the_threshold_moves_by_the_token_alone():
    given = {"Authorization": f"Bearer {TOKEN}"}
    with served() as (client, pair):
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": f"Basic {TOKEN}"}):
            assert client.put("/threshold", json={"threshold": 1.0}, headers=headers).status_code == 401
        assert client.get("/threshold").json() == {"score": "energy", "temperature": 1.0, "threshold": 5.0}
        reply = client.put("/threshold", json={"threshold": "-inf"}, headers=given)
        assert reply.json()["threshold"] == "-inf"
        assert pair.batcher.router.threshold.item() == float("-inf")
        same(client.post("/classify", json={"text": "3"}).json()["answers"][0], of_swift(3))
        for wrong in ("nan", "high", None):
            assert client.put("/threshold", json={"threshold": wrong}, headers=given).status_code == 422
    with served(token=None) as (client, _):
        assert client.put("/threshold", json={"threshold": 1.0}, headers=given).status_code == 405


# ---- what nobody thought of


@pytest.fixture(scope="module")
def api():
    """Of a service at a port of its own."""
    pair = FakePair()
    pair.batcher._pair._rows = pair.batcher._pair._super_rows = Digits()
    app = create_app(pair.batcher, warm_up=["1"], limits=Limits(texts=4, characters=50), token=TOKEN)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    with pair:
        thread.start()
        until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
        server.should_exit = True
        thread.join(LIMIT)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_nothing_that_is_sent_is_a_server_error(api, mode):
    """And every reply is one that the schema knows."""
    routes = [result.ok() for result in api.get_all_operations()]
    assert {(route.method, route.path) for route in routes} >= {("post", "/classify"), ("put", "/threshold")}
    seen = set()
    for route in routes:
        if mode is GenerationMode.NEGATIVE and route.method == "get":
            continue  # it takes nothing that could be wrong

        @given(case=route.as_strategy(generation_mode=mode))
        @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def attempt(case):
            response = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
            case.validate_response(
                response, checks=[not_a_server_error, status_code_conformance, response_schema_conformance]
            )
            seen.add((case.path, response.status_code))

        attempt()
    wanted = {("/readyz", 200), ("/threshold", 200), ("/classify", 422)}
    assert seen >= (wanted if mode is GenerationMode.POSITIVE else {("/classify", 422), ("/threshold", 422)})
    assert not {status for _, status in seen} & {502, 503}


# ---- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    pair = {
        "swift": demo_models.save_model(folder / "swift", seed=3, layers=1),
        "super": demo_models.save_model(folder / "super", seed=4),
    }
    joint = elang.pipeline("text-classification", **pair, router=elang.Router("margin", threshold=0.0))
    scores = [answer["energy"] for answer in joint(TEXTS)]
    sha256 = {f"{name}_sha256": fingerprint(side.model) for name, side in _sides(joint).items()}
    for name, share in (("half", 0.5), ("none", 1.0)):
        made = calibrate(
            {"margin": scores}, disagree=[False, True] * (len(TEXTS) // 2), swift_share=share, provenance=sha256
        )
        made.save(folder / f"{name}.json")
    return folder, pair, joint


def _sides(joint):
    return {"swift": joint.swift.reader, "super": joint.super_}


def test_elang_serve(saved, tmp_path):
    folder, pair, joint = saved
    file = tmp_path / "calibration.json"
    file.write_bytes((folder / "half.json").read_bytes())
    joint.router.set_threshold(Calibration.load(file).threshold)
    wanted = [(answer["label"], answer["model"]) for answer in joint(TEXTS)]
    assert {model for _, model in wanted} == {"swift", "super"}
    given = ["serve", "--swift", pair["swift"], "--super", pair["super"], "--calibration", str(file), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from elang.cli import app; app()", *given, "--threads", "1"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stderr:
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                break
        with httpx.Client(base_url=found[1], timeout=LIMIT) as client:
            assert client.get("/readyz").status_code == 200
            answers = client.post("/classify", json={"text": TEXTS}).json()["answers"]
            assert [(answer["label"], answer["model"]) for answer in answers] == wanted
            rows = len(TEXTS) + 3  # of the warm-up
            assert f'elang_score_bucket{{le="+Inf",model="service"}} {float(rows)}' in client.get("/metrics").text
            file.write_bytes((folder / "none.json").read_bytes())
            process.send_signal(signal.SIGHUP)
            until(lambda: client.get("/threshold").json()["threshold"] == "-inf")
            file.write_text("{")
            process.send_signal(signal.SIGHUP)
            answers = client.post("/classify", json={"text": TEXTS}).json()["answers"]
            assert {answer["model"] for answer in answers} == {"swift"}
            assert client.put("/threshold", json={"threshold": 0}).status_code == 405
        process.send_signal(signal.SIGTERM)
        errors = process.stderr.read()
        assert process.wait(LIMIT) in (0, -signal.SIGTERM), errors
        assert "the threshold stays: " in errors
    finally:
        process.kill()
        process.stderr.close()


def test_a_service_that_cannot_start_says_why(saved, tmp_path):
    folder, pair, _ = saved
    for options, code, message in (
        ([], 2, "wanted either --calibration, or --threshold"),
        (["--threshold", "1", "--calibration", folder / "half.json"], 2, "wanted either"),
        (["--threshold", "1", "--on-super-error", "cry"], 2, "got 'cry', wanted swift or raise"),
        (["--threshold", "1", "--score", "logit"], 1, "logit"),
    ):
        given = ["serve", "--swift", pair["swift"], "--super", pair["super"], *map(str, options)]
        result = CliRunner().invoke(command_line, given, env={"COLUMNS": "200"})
        assert (result.exit_code, message in " ".join(result.output.split())) == (code, True), result.output
    given = ["serve", "--swift", pair["super"], "--super", pair["swift"], "--calibration", str(folder / "half.json")]
    result = CliRunner().invoke(command_line, given)
    assert result.exit_code == 1
    assert "got other weights than the calibration was made with" in result.output
    assert os.sep not in result.output.split(":")[0]
