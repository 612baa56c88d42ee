"""More than two models behind one `forward()`: each row stops at the first that is sure of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from elang import contract, ops
from elang.calibration.artefact import Artefact
from elang.calibration.calibration import Calibration
from elang.calibration.cascade import CascadeCalibration, RouterSettings
from elang.dispatch import REAL, Routing, SuperInputs, first
from elang.fingerprint import fingerprint
from elang.joint import GRAPH, SETTINGS, JointClassifier
from elang.reference import Route, partition
from elang.router import Router
from elang.stats import Stats
from elang.super_model import OnError

Routers = Sequence[Router | Calibration | str | Path] | CascadeCalibration | str | Path


class CascadeRouting(NamedTuple):
    """What a cascade of n models decided about a batch of N rows.

    Holds what each router returned; the properties put it together when they are asked for, and not before.
    """

    first: Routing  # of the first router
    rest: tuple[CascadeRouting, ...]  # of the models after the first, on the rows that got there; of halves, of each
    models: int  # n

    @property
    def score(self) -> Tensor:
        """[N] float32: the first model's confidence."""
        return self.first.score

    @property
    def order(self) -> Tensor:
        """[N] int64: the rows that the first router routed first, each part in input order."""
        return self.first.order

    @property
    def n_routed(self) -> Tensor:
        """[1] int32: rows that the first router routed."""
        return self.first.n_routed

    @property
    def mode(self) -> str:
        return self.first.mode

    @property
    def overflow(self) -> Tensor | None:
        """[1] int32: rows that a model had no room for, at all stages; None: the mode has room for all."""
        each = [stage.overflow for stage in self.stages if stage.overflow is not None]
        return torch.stack(each).sum(dim=0, dtype=torch.int32) if each else None

    @property
    def degraded(self) -> Tensor | None:
        """[N] bool: rows whose router wanted another model's answer than they have; None: none can be."""
        each = [stage.degraded for stage in self.stages if stage.degraded is not None]
        return torch.stack(each).any(dim=0) if each else None

    @property
    def answered_by(self) -> Tensor:
        """[N] int64: the model that answered each row, from 0."""
        onward = _onward(self.first)
        if not self.rest:
            return onward.long()
        return _in_place(0, [1 + part.answered_by for part in self.rest], onward)

    @property
    def stages(self) -> tuple[Routing, ...]:
        """Of each router, about the rows of this batch: its score is NaN for those that never got to it."""
        if self.models == 2:
            return (self.first,)
        onward = _onward(self.first)
        if not self.rest:
            return (self.first, *[self._of_nobody()] * (self.models - 2))
        parts = zip(*(part.stages for part in self.rest), strict=True)
        return (self.first, *(_of_batch(onward, stage) for stage in parts))

    def _of_nobody(self) -> Routing:
        score, order, n_routed, overflow, degraded, mode, _ = self.first
        return Routing(
            torch.full_like(score, torch.nan),
            torch.arange(len(order), device=order.device),
            torch.zeros_like(n_routed),
            None if overflow is None else torch.zeros_like(overflow),
            None if degraded is None else torch.zeros_like(degraded),
            mode,
        )


class Cascade(JointClassifier):
    """Each row is answered by the first of n models that is sure of it, the last being sure of all.

    A `JointClassifier` whose Super is the cascade of the models after the first, and all that one is: the same forward,
    modes of dispatch and output, in the last model's label order and dtype; of two models, the very same. `.routing` is
    a `CascadeRouting`: `.answered_by` has the model of each row, `.stages` a `Routing` of each router. Nothing is kept
    between calls: threads may share a cascade.

    torch.compile of the whole is one graph in `capacity` mode. In the others a graph ends at each stage, and more than
    one stage may be compiled anew for other numbers of rows: compile the models before they come here.

    Args:
        models: n >= 2, from the quickest to the most accurate: all but the last as a `JointClassifier` takes a Swift,
            the last as it takes a Super.
        routers: of each model but the last; or a calibration of the cascade, or its file, of these very weights. One of
            the routers may be a `Calibration` of its model and the last one, or its file.
        dispatch: as of a `JointClassifier`, at each stage; "graph" for two models alone.
        super_inputs: for all models after the first, or for each: None, or the function that makes its inputs from
            those of the model before it.
        label_maps: for all models but the last, or for each: None, or its label -> the last model's.
        trim: as of a `JointClassifier`.
        super_devices: for all models after the first, or for each: where its inputs are sent; None: they stay.
        capacity: of `capacity` mode, for all models after the first or for each: rows that it sees, or their share of
            the batch that the model before it sees. No room is taken by the copies that fill a batch.
        buckets, graph_memory: as of a `JointClassifier`.
        on_super_error: "raise", or "swift": rows whose next model fails keep the answer that they have.
        super_timeout: seconds for each model after the first. A stage waits for what all those after it may take
            together.

    Raises:
        ValueError: as a `JointClassifier`; settings that are not one for each.
        RuntimeError: as a `JointClassifier`.
    """

    def __init__(
        self,
        models: Sequence[Callable[..., Any]],
        routers: Routers,
        dispatch: str = "exact",
        super_inputs: Sequence[SuperInputs | None] | SuperInputs | None = None,
        label_maps: Sequence[contract.LabelMap | None] | contract.LabelMap | None = None,
        trim: bool = True,
        super_devices: Sequence[torch.device | str | None] | torch.device | str | None = None,
        *,
        capacity: int | float | Sequence[int | float] | None = None,
        buckets: Sequence[int] | None = None,
        graph_memory: int | None = None,
        on_super_error: OnError = "raise",
        super_timeout: float | None = None,
    ) -> None:
        models = list(models)
        if len(models) < 2:
            raise ValueError(f"models: got {len(models)}, wanted at least 2")
        if dispatch == GRAPH and len(models) > 2:
            raise ValueError(f"dispatch: got 'graph' for {len(models)} models, wanted another: it is for two")
        for i, model in enumerate(models):
            contract.refuse_other_heads(model, f"models[{i}]")
        stages = len(models) - 1
        chosen = _routers(routers, models)
        inputs, maps = _each("super_inputs", super_inputs, stages), _each("label_maps", label_maps, stages)
        devices, room = _each("super_devices", super_devices, stages), _each("capacity", capacity, stages)
        shared: dict[str, Any] = {
            "dispatch": dispatch,
            "trim": trim,
            "buckets": buckets,
            "graph_memory": graph_memory,
            "on_super_error": on_super_error,
        }
        rest: Any = models[1]
        if stages > 1:
            rest = Cascade(
                models[1:],
                chosen[1:],
                super_inputs=inputs[1:],
                label_maps=maps[1:],
                super_devices=devices[1:],
                capacity=room[1:],
                super_timeout=super_timeout,
                **shared,
            )
        super().__init__(
            models[0],
            rest,
            chosen[0],
            super_inputs=inputs[0],
            label_map=maps[0],
            super_device=devices[0],
            capacity=room[0],
            super_timeout=None if super_timeout is None else stages * super_timeout,
            **shared,
        )
        self._models = tuple((f"models[{i}]", model) for i, model in enumerate(models))
        self._settings = {
            **shared,
            "label_maps": [None if each is None else list(each.items()) for each in maps],
            "capacity": room,
            "super_timeout": super_timeout,
        }
        self._rest = (rest,) if isinstance(rest, Cascade) else ()  # in a tuple: registered as `super_`
        if self._rest:
            self.plan = replace(self.plan, marks_real=dispatch != "exact")  # `exact` has no copies
            # Of the last model, where a JointClassifier would ask the next.
            self._typed, self._output_class = rest._typed, rest._output_class

    def decide(self, inputs: dict[str, Any]) -> Route:
        """The first model's decision, logits in the last model's label order. Takes `REAL` from the inputs: that a row
        is a copy, to be routed no further, is no model's business.
        """
        real = inputs.pop(REAL, None)
        route = super().decide(inputs)
        if real is None:
            return route
        order, n_routed = partition(~(first(route.order, route.n_routed) & real))
        return route._replace(order=order, n_routed=n_routed)

    def _record(self, routing: Routing, outputs: tuple[Any, ...]) -> CascadeRouting:
        rest = tuple(output.routing for output in outputs) if self._rest else ()
        return CascadeRouting(routing, rest, len(self._models))

    @property
    def routers(self) -> tuple[Router, ...]:
        """Of each model but the last; their thresholds may be set while the cascade serves."""
        return (self.router, *(router for rest in self._rest for router in rest.routers))

    @property
    def stage_stats(self) -> tuple[Stats, ...]:
        """`stats` of each router. Synchronizes: yes; nothing that counts does."""
        each = [self.stats]
        for rest in self._rest:
            for stats in rest.stage_stats:
                # Not the rows of its batches, of which some are copies: those that got there.
                each.append(stats._replace(rows=each[-1].routed - each[-1].degraded))
        return tuple(each)

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write every model (`0/`, `1/`, ..., safetensors) and `elang.json`: routers, dispatch and label settings.

        `super_inputs` are code and `super_devices` belong to a machine: pass them to `from_pretrained` again.
        `kwargs` go to the models' `save_pretrained`.

        Raises:
            TypeError: a model without `save_pretrained`.
        """
        for name, model in self._models:
            if not hasattr(model, "save_pretrained"):
                raise TypeError(f"{name}: got {type(model).__name__}, wanted a model with save_pretrained")
        settings = _Settings(
            routers=tuple(
                RouterSettings(score=r.score, temperature=r.temperature, threshold=r.threshold.item())
                for r in self.routers
            ),
            super_inputs=self._has_super_inputs(),
            **self._settings,
        )
        for i, (_, model) in enumerate(self._models):
            model.save_pretrained(Path(folder) / str(i), **kwargs)
        settings.save(Path(folder) / SETTINGS)

    def _has_super_inputs(self) -> tuple[bool, ...]:
        own = self.plan.super_inputs is not None
        return (own, *(given for rest in self._rest for given in rest._has_super_inputs()))

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dispatch: str | None = None,
        super_inputs: Sequence[SuperInputs | None] | SuperInputs | None = None,
        super_devices: Sequence[torch.device | str | None] | torch.device | str | None = None,
        **kwargs: Any,
    ) -> Cascade:
        """Read what `save_pretrained` wrote. `kwargs` go to the models' `from_pretrained`.

        Args:
            dispatch: another mode than the saved one, without its settings.

        Raises:
            ValueError: the cascade was saved with other `super_inputs` than are given.
        """
        saved = _Settings.load(Path(folder) / SETTINGS)
        given = tuple(each is not None for each in _each("super_inputs", super_inputs, len(saved.routers)))
        if given != saved.super_inputs:
            raise ValueError(
                f"super_inputs: got {list(given)}, wanted functions where there were: {saved.super_inputs}"
            )
        models = [
            AutoModelForSequenceClassification.from_pretrained(Path(folder) / str(i), use_safetensors=True, **kwargs)
            for i in range(len(saved.routers) + 1)
        ]
        settings = saved.model_dump(exclude={"version", "routers", "super_inputs", "label_maps"})
        if dispatch is not None:
            settings |= {"dispatch": dispatch, "capacity": None, "buckets": None, "graph_memory": None}
        return cls(
            models,
            [router.router() for router in saved.routers],
            super_inputs=super_inputs,
            label_maps=[None if pairs is None else dict(pairs) for pairs in saved.label_maps],
            super_devices=super_devices,
            **settings,
        )


class _Settings(Artefact):
    version: Literal[1] = 1
    routers: tuple[RouterSettings, ...]
    dispatch: str
    label_maps: tuple[tuple[tuple[str | int, str | int], ...] | None, ...]
    trim: bool
    capacity: tuple[int | float | None, ...]
    buckets: tuple[int, ...] | None
    graph_memory: int | None
    on_super_error: OnError
    super_timeout: float | None
    super_inputs: tuple[bool, ...]


def _routers(routers: Routers, models: list[Any]) -> list[Router]:
    """Of each model but the last. Raises ValueError for a calibration of other weights, or of more models or fewer."""
    if isinstance(routers, str | Path):
        routers = CascadeCalibration.load(routers)
    if isinstance(routers, CascadeCalibration):
        if len(routers.models) != len(models):
            raise ValueError(f"routers: got a calibration of {len(routers.models)} models, wanted of {len(models)}")
        for i, (model, known) in enumerate(zip(models, routers.models, strict=True)):
            if known.sha256 is not None and isinstance(model, torch.nn.Module) and fingerprint(model) != known.sha256:
                raise ValueError(f"models[{i}]: got other weights than the calibration was made with")
        return routers.routers()
    if not isinstance(routers, Sequence):
        raise TypeError(
            f"routers: got {type(routers).__name__}, wanted a sequence of them or a calibration of the cascade"
        )
    if len(routers) != len(models) - 1:
        raise ValueError(f"routers: got {len(routers)}, wanted {len(models) - 1}, one less than models")
    return [contract.router_of(router, model, models[-1]) for router, model in zip(routers, models[:-1], strict=True)]


def _each(name: str, value: Any, count: int) -> list[Any]:
    """One for each stage, of one for all or of as many."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)}, wanted {count}, one for each model but one")
    return values


def _onward(routing: Routing) -> Tensor:
    """[N] bool: the rows that the next model answered, or sent on."""
    routed = first(routing.order, routing.n_routed)
    return routed if routing.degraded is None else routed & ~routing.degraded


def _in_place(elsewhere: Any, parts: Sequence[Tensor], onward: Tensor) -> Tensor:
    """[N]: at the rows that went on, in turn, what the parts of their batch say; what fills it up is not read."""
    there = torch.cat([part.to(onward.device) for part in parts])
    kept = torch.full((len(onward),), elsewhere, dtype=there.dtype, device=onward.device)
    return ops.merge_rows(kept, there, *partition(~onward))


def _of_batch(onward: Tensor, parts: Sequence[Routing]) -> Routing:
    """A router's record on the rows that went on, one for each part of their batch, as one on all rows."""
    routed = _in_place(False, [first(part.order, part.n_routed) for part in parts], onward)
    overflow = [part.overflow.to(onward.device) for part in parts if part.overflow is not None]
    degraded = [part.degraded for part in parts if part.degraded is not None]
    return Routing(
        _in_place(torch.nan, [part.score for part in parts], onward),
        *partition(~routed),
        torch.stack(overflow).sum(dim=0, dtype=torch.int32) if overflow else None,
        _in_place(False, degraded, onward) if degraded else None,
        parts[0].mode,
    )
