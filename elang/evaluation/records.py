"""What is particular about the records of single tasks: nested files, fields derived for templates, T5's answers."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from elang.evaluation.loaders import Record

STSB_CLASSES = 26


def stsb_class(score: float) -> int:
    """T5's class of a similarity: the nearest of 0.0, 0.2, ... 5.0, in float32, halves going to the even one.

    Its paper counts 21 classes, from 1 to 5; the data begin at 0, which makes 26.
    """
    if not 0 <= score <= 5:
        raise ValueError(f"score: got {score}, wanted 0 to 5")
    return int(np.rint(np.float32(score) * np.float32(5)))


def stsb_score(label: int) -> float:
    """The similarity that a class stands for: the way back from `stsb_class`."""
    if not 0 <= label < STSB_CLASSES:
        raise ValueError(f"label: got {label}, wanted 0 to {STSB_CLASSES - 1}")
    return label / 5


def flat_multirc(row: Record) -> Iterator[Record]:
    """One record for each answer to each question about a paragraph."""
    for question in row["passage"]["questions"]:
        for answer in question["answers"]:
            yield {
                "paragraph": row["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "label": answer["label"],
                "idx": {"paragraph": row["idx"], "question": question["idx"], "answer": answer["idx"]},
            }


def flat_record(row: Record) -> Iterator[Record]:
    """One record for each query about a passage. Positions of entities include the last character."""
    text = row["passage"]["text"]
    for query in row["qas"]:
        yield {
            "passage": text,
            "query": query["query"],
            "entities": sorted({text[span["start"] : span["end"] + 1] for span in row["passage"]["entities"]}),
            "answers": sorted({answer["text"] for answer in query["answers"]}),
            "idx": {"passage": row["idx"], "query": query["idx"]},
        }


def flat_wsc(row: Record) -> Iterator[Record]:
    """The two spans beside the text that they are in."""
    yield {**row, **row["target"]}


_COPA_QUESTIONS = {"cause": "What was the cause of this?", "effect": "What happened as a result?"}


def prepare_copa(record: Record) -> Record:
    """The question is asked as COPA's authors do."""
    if record["question"] not in _COPA_QUESTIONS:
        raise ValueError(f"question: got {record['question']!r}, wanted 'cause' or 'effect'")
    asked = _COPA_QUESTIONS[record["question"]]
    return {**record, "asked": asked, "candidates": (record["choice1"], record["choice2"])}


def prepare_multirc(record: Record) -> Record:
    """The mark-up of sentences is left out; the answers to one question make a group."""
    fields = ("paragraph", "question", "answer")
    plain = {name: re.sub("</?b>", "", record[name].replace("<br>", " ")) for name in fields}
    idx = record["idx"]
    group = f"{idx['paragraph']}.{idx['question']}"
    return {**record, **plain, "group": group, "idx": f"{group}.{idx['answer']}"}


def prepare_record(record: Record) -> Record:
    """The highlights are made sentences of the passage."""
    return {
        **record,
        "idx": f"{record['idx']['passage']}.{record['idx']['query']}",
        "passage": re.sub(r"""([.?!"']?)\n@highlight\n""", lambda end: f"{end[1] or '.'} ", record["passage"]),
        "entities": ", ".join(record["entities"]),
        "candidates": tuple(record["entities"]),
        "references": tuple(record["answers"]),
    }


def prepare_wsc(record: Record) -> Record:
    """The pronoun stands between asterisks, where it occurs nearest to its index: a few rows have a wrong one.

    Where it does not occur at all nothing is marked.
    """
    text, index = record["text"], record["span2_index"]
    pronouns = re.finditer(rf"\b{re.escape(record['span2_text'].strip(' .'))}\b", text, re.IGNORECASE)
    found = min(pronouns, key=lambda pronoun: abs(text.count(" ", 0, pronoun.start()) - index), default=None)
    marked = f"{text[: found.start()]}*{found[0]}*{text[found.end() :]}" if found else text
    return {**record, "text": marked, "candidates": (record["span1_text"],)}


_DETERMINERS = {"a", "an", "the", "this", "that", "these", "those", "each", "every", "few", "many", "much", "some"}
_DETERMINERS |= {"my", "your", "his", "her", "our", "their", "which", "whose"}


def wsc_label(text: str, candidates: tuple[str, ...]) -> int:
    """1 if the answer is the noun, words that only one of them has, determiners and case aside: T5's rule.

    Both or neither have to be possessive: a "hat" is not "Ann's hat".
    """
    answer, noun = text.lower(), candidates[0].lower()
    a, b = (set(words.split()) - _DETERMINERS for words in (answer, noun))
    return int(bool(a and b) and (a <= b or b <= a) and ("'" in answer) == ("'" in noun))
