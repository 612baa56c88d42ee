"""Text in, answers out: Swift and Super, each behind its own tokenizer, joined by what they say and nothing else."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, overload

import torch
from transformers import PreTrainedModel

from elang.backbones import find
from elang.calibration import Calibration, GateCalibration
from elang.contract import check_weights, router_of
from elang.energy_head import EnergyHead
from elang.gated import GatedSwift
from elang.late import LateRouter
from elang.progress import bar
from elang.readers import (
    TASKS,
    Answer,
    Classifier,
    Decision,
    Function,
    FunctionSuper,
    GatedGenerator,
    Generator,
    RoutedClassifier,
    Source,
    Texts,
    reader_of,
)
from elang.router import Router
from elang.stats import Counts, Stats


class Swift(Protocol):
    def decide(self, texts: Texts) -> Decision: ...


class Super(Protocol):
    def answer(self, texts: Texts) -> list[Answer]: ...


def pipeline(
    task: str,
    *,
    swift: Source,
    super: Source | Function | JointPipeline,
    head: EnergyHead | str | Path | None = None,
    router: Router | Calibration | str | Path | None = None,
    late: LateRouter | None = None,
    gates: GateCalibration | str | Path | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    super_device: torch.device | str | None = None,
    **generate_kwargs: Any,
) -> JointPipeline:
    """A function that has each text answered by one model: by Swift where it is sure, else by Super.

    Only text passes between the two. A routed text is tokenised anew for Super, so that neither tokenizers nor
    architectures have to agree, nor the labels of classifiers, which come out as the answering model names them. What a
    model wants in front of a text, as T5 the name of its task, has to be there.

    Args:
        task: one of `TASKS`. "text-classification" takes sequence classifiers, and encoder-decoders that write the
            label, in any pairing; the others take encoder-decoders.
        swift: a folder or hub id, of which safetensors are read; or a pair (model, tokenizer).
        super: the same, or any function from a list of texts to as many; or another pipeline for this task, which makes
            a cascade: its models answer what Swift does not.
        head, router: gate 1; of a sequence classifier the router alone. A head may be the folder that it was saved in,
            a router a `Calibration` or its file. Moved to Swift's device, the head to its dtype.
        late: gate 2, of an encoder-decoder; moved to Swift's device.
        gates: what `calibrate_gates` chose, or its file, in place of `router` and `late`.
        batch_size: texts that Swift sees at once; those routed of them are one batch of Super's.
        device: where a Swift that is loaded by name goes, and such a Super too; None: they are not moved.
        super_device: where a Super that is loaded by name goes instead.
        generate_kwargs: for `generate` of each encoder-decoder, over its own `generation_config`.

    Raises:
        ValueError, TypeError: an argument that is not as described, by its name; a model or a gate that does not serve
            the task; several sequences of a text, or other outputs than sequences, asked for.
    """
    super_ = super
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, wanted one of {', '.join(TASKS)}")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size!r}, wanted a whole number >= 1")
    for name, where, model in (("device", device, swift), ("super_device", super_device, super_)):
        if where is not None and not isinstance(model, str | Path):
            raise ValueError(f"{name}: got {where} for a model that is not loaded by name, wanted None: it stays")
    head = EnergyHead.load(head) if isinstance(head, str | Path) else head
    if gates is not None and (router is not None or late is not None):
        raise ValueError("gates: got them beside a router or a late router, wanted either")
    for name, value, kind in (("head", head, EnergyHead), ("late", late, LateRouter)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted {kind.__name__}")
    first = reader_of("swift", swift, task, device, generate_kwargs)
    second: Classifier | Generator | FunctionSuper | PipelineSuper
    if isinstance(super_, JointPipeline):
        if super_.task != task:
            raise ValueError(f"super: got a pipeline for {super_.task}, wanted one for {task}")
        second = PipelineSuper(super_)
    elif callable(super_) and not isinstance(super_, PreTrainedModel):
        second = FunctionSuper(super_)
    else:
        second = reader_of("super", super_, task, super_device or device, generate_kwargs)
    models = first.model, getattr(second, "model", None)
    gate = None if router is None else router_of(router, *models)
    if gates is not None:
        gate, late = _chosen(gates, head, *models)
    gated = _gated(first, head, gate, late)
    if generate_kwargs and not any(isinstance(reader, Generator) for reader in (first, second)):
        raise ValueError(f"{', '.join(generate_kwargs)}: got for models that do not generate, wanted none")
    return JointPipeline(task, gated, second, gate, late, batch_size)


@dataclass(frozen=True, eq=False, repr=False)
class JointPipeline:
    """What `elang.pipeline` makes: called with texts, it answers each of them, in input order. Threads may share it.

    A str is answered by a dict; what has a length, by a list of them, with a progress bar on a terminal; any other
    iterable by a generator, which reads a batch when the first answer to it is asked for. Beside the key of the task:

    - `model`: "swift" or "super"; where Super is a pipeline, "super.swift" or "super.super" and so on.
    - `score`: how probable the answering model finds its answer: a classifier's probability of the label; of generated
      text the geometric mean of its tokens' probabilities, for which the logits of a batch's steps are kept until it is
      done. None for a function.
    - `energy`: what the router compared, of every text, routed or not; the late router, where it is alone.

    A text that is too long for a model is cut as its tokenizer cuts, and a warning logged. A text without a token has
    its answer too: Super's, if an energy head decides.
    """

    task: str
    swift: Swift
    super_: Super
    router: Router | None
    late: LateRouter | None
    batch_size: int
    counts: Counts = field(default_factory=Counts, init=False)

    @overload
    def __call__(self, texts: str) -> dict[str, Any]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Collection[str]) -> list[dict[str, Any]]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, texts: Iterable[str]) -> Iterator[dict[str, Any]]: ...
    def __call__(self, texts: Iterable[str]) -> dict[str, Any] | list[dict[str, Any]] | Iterator[dict[str, Any]]:
        """Answer a text or several.

        Raises:
            TypeError: what is no text, by its index; in a list, before any is answered.
            ValueError, TypeError: the function for Super returned something else than a text for each of its own.
            RuntimeError: Swift or Super is in training mode.
        """
        if isinstance(texts, str):
            return self._batch({0: texts})[0]
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            raise TypeError(f"texts: got {type(texts).__name__}, wanted a str or an iterable of them")
        if not isinstance(texts, Sized):
            return self._answers(_numbered(texts))
        numbered, answers = list(_numbered(texts)), []
        with bar(self.task) as report:
            for answer in self._answers(iter(numbered)):
                answers.append(answer)
                report(len(answers), len(numbered))
        return answers

    @property
    def stats(self) -> Stats:
        """What has been answered so far, by whom."""
        return self.counts.read()

    def _answers(self, numbered: Iterator[tuple[int, str]]) -> Iterator[dict[str, Any]]:
        while batch := dict(islice(numbered, self.batch_size)):
            yield from self._batch(batch)

    def _batch(self, texts: Texts) -> list[dict[str, Any]]:
        energy, answers = self.swift.decide(texts)
        routed = {place: text for place, text in texts.items() if place not in answers}
        if routed:
            answers = answers | dict(zip(routed, self.super_.answer(routed), strict=True))
        self.counts.add(len(texts), len(routed), len(routed))
        return [
            {
                TASKS[self.task]: answers[place].text,
                "model": (answers[place].model or "super") if place in routed else "swift",
                "score": answers[place].score,
                "energy": energy[place],
            }
            for place in texts
        ]


@dataclass(frozen=True)
class PipelineSuper:
    """A pipeline as the Super of another."""

    pipeline: JointPipeline

    @property
    def model(self) -> Any:
        """The last one, by which the thresholds before it were calibrated."""
        return getattr(self.pipeline.super_, "model", None)

    def answer(self, texts: Texts) -> list[Answer]:
        key = TASKS[self.pipeline.task]
        answers = self.pipeline._answers(iter(texts.items()))
        return [Answer(answer[key], answer["score"], f"super.{answer['model']}") for answer in answers]


def _numbered(texts: Iterable[str]) -> Iterator[tuple[int, str]]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: got {type(text).__name__}, wanted a str")
        yield index, text


def _chosen(
    gates: GateCalibration | str | Path, head: EnergyHead | None, swift: Any, super_: Any
) -> tuple[Router | None, LateRouter | None]:
    """The routers of the gates that were chosen for these models."""
    if not isinstance(gates, GateCalibration):
        gates = GateCalibration.load(gates)
    check_weights(gates.provenance, swift, super_)
    if (gates.early is None) != (head is None):
        wanted = "none: they do without" if gates.early is None else "the one they were chosen with"
        raise ValueError(f"head: got {'none' if head is None else 'one'} for these gates, wanted {wanted}")
    router = late = None
    if head is not None:
        score = "logit" if head.output.out_features == 1 else "energy"
        router = Router(score, threshold=gates.early_threshold)
    if gates.late is not None:
        late = LateRouter(gates.late, threshold=gates.late_threshold)
    return router, late


def _gated(
    reader: Classifier | Generator, head: EnergyHead | None, router: Router | None, late: LateRouter | None
) -> Swift:
    parameter = next(reader.model.parameters())
    if isinstance(reader, Generator):
        GatedSwift(reader.model, head, router, late)  # refuses what is no pair of gates
        # A gate that lets everything pass: for the scores of the answers.
        gated = GatedSwift(reader.model, head, router, late or LateRouter(threshold=-math.inf))
        if head is not None:
            head.to(parameter.device, parameter.dtype)
        for gate in filter(None, (router, gated.late)):
            gate.to(parameter.device)
        return GatedGenerator(reader, gated)
    if head is not None or late is not None or router is None:
        got = ", ".join(name for name, gate in (("head", head), ("router", router), ("late", late)) if gate is not None)
        raise ValueError(f"head, router, late: got {got or 'none'}, wanted the router alone for a sequence classifier")
    return RoutedClassifier(reader, find(reader.model), router.to(parameter.device))
