"""Ray Serve on one machine: what a call between replicas costs, and both models apart against together.

`python benches/bench_ray.py` takes a few minutes; `--save` keeps what it measured in results/ray.json. HTTP is on
loopback, and Ray's own ports ask for a token. Both ways serve at once and are asked in turn, so that each has the same
machine; all figures are ratios of times taken side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_TOKEN=secrets.token_hex(32), OMP_NUM_THREADS="1")

import numpy as np
import ray
import report
import torch
from measure import microseconds
from ray import serve
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast
from wire import HOST, Client

from elang import Router
from elang.serve.ray_app import Settings, app

CLIENTS = 8  # each asks one text, and the next when it has its answer
SHARE_ROUTED = 0.32  # the average of the paper's BERT table
ROUNDS, SECONDS = 5, 4.0  # of each way in turn
CALLS = 500
WORDS, LENGTH, TEXTS = 1000, 32, 512
SWIFT = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
# The shapes of TinyBERT-4L-312 and BERT-base, with random weights.
SUPERS = {
    "quick": dict(hidden_size=312, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1200),
    "slow": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
WAYS = ("apart", "together")


def save_model(folder: Path, seed: int, sizes: dict[str, int]) -> Any:
    torch.manual_seed(seed)
    words = {word: number for number, word in enumerate(["[PAD]", *map(str, range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="0").save_pretrained(folder)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(words), num_labels=2, **sizes)).eval()
    model.save_pretrained(folder)
    return model


@contextmanager
def local_ray() -> Iterator[int]:
    """The port of its HTTP proxy."""
    with socket.create_server((HOST, 0)) as listening:
        port: int = listening.getsockname()[1]
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=100 << 20,
    )
    try:
        serve.start(http_options={"host": HOST, "port": port})
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


async def ask(port: int, way: str, texts: Sequence[str], seconds: float) -> list[float]:
    """The time of each request that `CLIENTS` of them make."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    async def one(seed: int) -> None:
        chance = random.Random(seed)
        async with Client(port) as client:
            while (start := time.perf_counter()) < end:
                body = json.dumps({"text": chance.choice(texts)}).encode()
                status, reply = await client.request("POST", f"/{way}/classify", body)
                if status != 200 or json.loads(reply)["answers"][0]["degraded"]:
                    raise RuntimeError(f"{way}: got {status}, {reply!r}")
                took.append(time.perf_counter() - start)

    await asyncio.gather(*map(one, range(CLIENTS)))
    return took


@torch.no_grad()
def bench(name: str, port: int, folder: Path, rounds: int, seconds: float) -> dict[str, Any]:
    swift, super_ = save_model(folder / "swift", 0, SWIFT), save_model(folder / name, 1, SUPERS[name])
    rows = torch.randint(1, WORDS + 1, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(2))
    texts = [" ".join(str(number - 1) for number in row) for row in rows.tolist()]
    scores = Router("margin", threshold=0.0).from_logits(swift(rows).logits).score
    threshold = float(scores.quantile(SHARE_ROUTED))
    for way in WAYS:
        settings = Settings(
            swift=str(folder / "swift"),
            super=str(folder / name),
            score="margin",
            threshold=threshold,
            together=way == "together",
            on_super_error="raise",
        )
        serve.run(app(settings), name=way, route_prefix=f"/{way}")
    handle = serve.get_deployment_handle("Super", "apart")
    # What is asked of Super returns at once, so that this is the call alone.
    hop = microseconds({"hop": lambda: handle.config.remote().result()}, seconds, burst=CALLS // 10)["hop"]
    alone = microseconds({"super": partial(super_, rows[:1])}, seconds)["super"]
    took: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        asyncio.run(ask(port, way, texts, seconds / 2))  # unheard
    for _ in range(rounds):
        for way in WAYS:
            took[way] += asyncio.run(ask(port, way, texts, seconds))
    for way in WAYS:
        serve.delete(way)
    apart, together = (np.percentile(took[way], (50, 99)) for way in WAYS)
    return {
        "super": name,
        "clients": CLIENTS,
        "share_routed": SHARE_ROUTED,
        "requests": {way: len(took[way]) for way in WAYS},
        "hop_over_super": {q: round(hop[q] / alone["p50"], 3) for q in ("p50", "p99")},
        "apart_over_together": {
            "p50": round(float(apart[0] / together[0]), 3),
            "p99": round(float(apart[1] / together[1]), 3),
            "throughput": round(len(took["apart"]) / len(took["together"]), 3),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each way in turn")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a round")
    parser.add_argument("--save", action="store_true", help="in results/ray.json: only of an idle machine")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, local_ray() as port:
        cells = [bench(name, port, Path(folder), options.rounds, options.seconds) for name in SUPERS]
    report.SECTIONS["ray"](Console(), cells)
    if options.save:
        report.save({"ray": cells}, report.results_file("ray"), "python benches/bench_ray.py --save")


if __name__ == "__main__":
    main()
