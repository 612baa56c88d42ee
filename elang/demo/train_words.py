"""Two small T5 models that learn to say words, from scratch; made once and kept as safetensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from elang.demo.words import Dictionary, Words, tokenizer_for
from elang.demo.workers import Workers
from elang.evaluation.predict import Encoded
from elang.late import LATE_SCORES, late_scores
from elang.progress import Report
from elang.store import key_of, published

MAX_NEW_TOKENS = 20  # the longest pronunciation of 12 letters has 14
ANSWERED, ANSWER_BATCH = ("head", "calibration", "test"), 128


@dataclass(frozen=True)
class Recipe:
    """A model and how it is trained; part of the key that it is cached under."""

    width: int
    encoder_layers: int
    decoder_layers: int
    learning_rate: float
    steps: int
    batch_size: int = 32  # at 128 these models do not learn which letters make which sounds
    warm_up: float = 0.05  # share of the steps
    decay: float = 0.5  # share of the steps, the last ones, to a rate of 0
    seed: int = 0


SWIFT = Recipe(width=64, encoder_layers=2, decoder_layers=1, learning_rate=2e-3, steps=3_000)
SUPER = Recipe(width=128, encoder_layers=3, decoder_layers=3, learning_rate=6e-4, steps=6_500)


class Answers(NamedTuple):
    """What a model says for N words, and how sure it was of it."""

    texts: list[str]
    late: dict[str, NDArray[np.float32]]  # each of `LATE_SCORES`, [N]


class WordPair(NamedTuple):
    swift: Path
    super_: Path
    swift_answers: dict[str, Answers]  # by part: those of `ANSWERED`
    super_answers: dict[str, Answers]


def train_word_pair(words: Dictionary, cache: Path, progress: Progress) -> WordPair:
    """The pair for these words, and its answers to those held out, from the cache or made now, side by side."""
    cache.mkdir(parents=True, exist_ok=True)
    folders: list[Path] = []
    jobs = []
    for name, recipe in (("swift", SWIFT), ("super", SUPER)):
        folder = cache / f"words-{name}-{key_of(words.sha256, asdict(recipe), ANSWERED)}"
        folders.append(folder)
        if not (folder / "answers.safetensors").exists():
            title = f"{name.title()}: {recipe.encoder_layers}-{recipe.decoder_layers} layers, {recipe.width} wide"
            jobs.append((title, learn, folder, words, recipe))
    if jobs:
        with Workers(progress) as workers:
            workers.run(*jobs)
    swift, super_ = folders
    return WordPair(swift, super_, _answers(swift), _answers(super_))


def learn(report: Report, folder: Path, words: Dictionary, recipe: Recipe) -> None:
    """Train a model, have it answer the words held out, and save both."""
    tokenizer = tokenizer_for(words.phonemes)
    answered = sum(len(getattr(words, part)) for part in ANSWERED)
    # A word answered takes about a fifth of the time of one learnt.
    total = recipe.steps + answered // (5 * recipe.batch_size)
    model = fit(words.train, tokenizer, recipe, lambda done, _: report(done, total))
    known = {}
    for part in ANSWERED:
        for name, values in answer(model, tokenizer, getattr(words, part).spelt).items():
            known[f"{part}.{name}"] = values
    with published(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        save_file(known, unfinished / "answers.safetensors")
    report(total, total)


def fit(words: Words, tokenizer: Any, recipe: Recipe, report: Report) -> Any:
    """AdamW, linear warm-up, a flat stretch, linear decay; batches of similar length. No dropout: words are many."""
    torch.manual_seed(recipe.seed)
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": recipe.width,
        "d_kv": recipe.width // 4,
        "d_ff": 4 * recipe.width,
        "num_heads": 4,
        "num_layers": recipe.encoder_layers,
        "num_decoder_layers": recipe.decoder_layers,
        "dropout_rate": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    model = T5ForConditionalGeneration(T5Config(**config))
    model.generation_config.max_new_tokens = MAX_NEW_TOKENS
    spelt, said = (Encoded(tokenizer, texts, None) for texts in (words.spelt, [ways[0] for ways in words.said]))
    ids = [(spelt.ids, tokenizer.pad_token_id), (said.ids, -100)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    warm_up, decay = recipe.warm_up * recipe.steps, recipe.decay * recipe.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up, (recipe.steps - step) / decay)
    )
    rng, step = np.random.default_rng(recipe.seed), 0
    model.train()
    while step < recipe.steps:
        batches = list(spelt.by_length(recipe.batch_size, noise=rng.uniform(0, 2, len(spelt))))
        for i in rng.permutation(len(batches))[: recipe.steps - step]:
            inputs, labels = (_padded(texts, batches[i], value) for texts, value in ids)
            model(
                input_ids=inputs, attention_mask=(inputs != tokenizer.pad_token_id).long(), labels=labels
            ).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            report(step, recipe.steps)
    model.train(False)
    return model


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, spelt: list[str]) -> dict[str, NDArray[Any]]:
    """Greedy: `tokens` [N, L], padded, and each of `LATE_SCORES` [N]."""
    encoded = Encoded(tokenizer, spelt, None)
    tokens = np.full((len(spelt), MAX_NEW_TOKENS), tokenizer.pad_token_id, dtype=np.int64)
    scores = {name: np.empty(len(spelt), dtype=np.float32) for name in LATE_SCORES}
    for rows in encoded.by_length(ANSWER_BATCH):
        inputs = {name: v for name, v in encoded.batch(rows).items() if name != "token_type_ids"}
        output = model.generate(**inputs, return_dict_in_generate=True, output_logits=True)
        said = output.sequences[:, 1:].numpy()
        tokens[rows, : said.shape[1]] = said
        for name, values in late_scores(output, model.generation_config.eos_token_id).items():
            scores[name][rows] = values.numpy()
    return {"tokens": tokens, **scores}


def _padded(ids: list[list[int]], rows: NDArray[np.int64], value: int) -> Tensor:
    return pad_sequence([torch.tensor(ids[row]) for row in rows], batch_first=True, padding_value=value)


def _answers(folder: Path) -> dict[str, Answers]:
    tokenizer, known = AutoTokenizer.from_pretrained(folder), load_file(folder / "answers.safetensors")
    answers = {}
    for part in ANSWERED:
        texts = tokenizer.batch_decode(known[f"{part}.tokens"], skip_special_tokens=True)
        answers[part] = Answers(texts, {name: known[f"{part}.{name}"] for name in LATE_SCORES})
    return answers


def load(folder: Path) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
