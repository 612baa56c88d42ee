"""Swift and Super behind one `forward()`: a drop-in for a Hugging Face sequence classifier."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification
from transformers.utils.generic import ModelOutput

from elang import backbones, contract, cuda_graph
from elang import dispatch as modes
from elang.calibration import Calibration
from elang.dispatch import BUCKETS, MODES, Plan, Routing, SuperInputs
from elang.reference import Route
from elang.router import Router
from elang.stats import Counts, Stats
from elang.super_model import ON_ERROR, OnError, SuperModel

SETTINGS = "elang.json"
GRAPH = "graph"


class JointClassifier(nn.Module):
    """Swift answers the rows it is sure of, Super the others; called and used like either of them.

    The answer is of Super's output class: `logits` [N, C] in input order and Super's label order, `loss`
    (cross-entropy on these logits) if `labels` are given, and `.routing` (a `Routing`) as a plain attribute. For
    inference only: no gradients, and both models have to be in eval mode. Neither model is changed, nor moved; many
    joints and threads may share them. Swift is split at its head and Super taken here, once: give them their adapters,
    hooks or `torch.compile` before.

    Args:
        swift: a Hugging Face sequence classifier, a model known to `register_backbone`, or any callable that returns
            logits.
        super_: any callable that takes the same keyword inputs (or those of `super_inputs`) and returns logits.
        router: score and threshold; moved to Swift's device. Or a calibration, or its file, of these very weights.
        dispatch: one of `elang.dispatch.MODES`, "graph" (see `elang.cuda_graph`), or "auto": `capacity` under export
            and graph capture, `bucket` under torch.compile, else `exact`. `.routing.mode` says which ran.
        capacity: of `capacity` mode: rows that Super sees in every batch (int), or their share of the batch (float).
        buckets: of `bucket` and `graph` mode: the sizes of Super's batches, ascending; a batch's own number of rows is
            one too.
        graph_memory: of `graph` mode: the most bytes that its graphs may take; None: 4 GiB.
        super_inputs: `super_inputs(inputs: dict, rows: LongTensor) -> dict` builds Super's inputs for the routed
            rows, where they are not Swift's (another tokenizer, say). `rows` is int64, one for each row of Super's
            batch: where that is padded, the last routed row again. In `graph` mode it is captured: tensors in, tensors
            out, and no look at a value.
        label_map: Swift's label -> Super's label, by name or by class number, for all labels. Needed unless both
            models carry the same label names, whose order and case may differ.
        trim: in `exact` and `bucket` mode cut trailing padding that no routed row needs; False for a Super that looks
            past `attention_mask`.
        super_device: where Super's inputs are sent, if Super is not on Swift's device.
        on_super_error: "raise", or "swift": rows whose Super fails keep Swift's answer, are marked in
            `.routing.degraded`, counted in `.stats` and logged. Out of memory is tried once more in halves before.
        super_timeout: seconds after which a call of Super has failed; None: never.

    Raises:
        ValueError: unknown dispatch mode or setting, multi-label or regression head, labels that do not match.
        RuntimeError: "graph" where there is no CUDA device, or no conditional node: says why.
    """

    swift: Any
    super_: Any
    _permutation: Tensor | None  # [C] int64, Swift's column of each of Super's labels; None: the same order

    def __init__(
        self,
        swift: Callable[..., Any],
        super_: Callable[..., Any],
        router: Router | Calibration | str | Path,
        dispatch: str = "exact",
        super_inputs: SuperInputs | None = None,
        label_map: contract.LabelMap | None = None,
        trim: bool = True,
        super_device: torch.device | str | None = None,
        *,
        capacity: int | float | None = None,
        buckets: Sequence[int] | None = None,
        graph_memory: int | None = None,
        on_super_error: OnError = "raise",
        super_timeout: float | None = None,
    ) -> None:
        super().__init__()
        buckets = BUCKETS if buckets is None else buckets
        _check_dispatch(dispatch, capacity, buckets, graph_memory)
        if on_super_error not in ON_ERROR:
            raise ValueError(f"on_super_error: got {on_super_error!r}, wanted one of {', '.join(ON_ERROR)}")
        if super_timeout is not None and not 0 < super_timeout <= threading.TIMEOUT_MAX:
            raise ValueError(f"super_timeout: got {super_timeout!r}, wanted None or a finite number of seconds > 0")
        if dispatch == GRAPH and (on_super_error == "swift" or super_timeout is not None):
            raise ValueError(
                "on_super_error, super_timeout: got one with dispatch='graph', which cannot catch; 'exact' can"
            )
        contract.refuse_other_heads(swift, "swift")
        contract.refuse_other_heads(super_, "super_")
        router = contract.router_of(router, swift, super_)
        self.swift = swift
        self.super_ = super_
        # Found without nn.Module's search for attributes.
        self._models: tuple[tuple[str, Any], ...] = ("swift", swift), ("super_", super_)
        self.dispatch = dispatch
        self.capacity = capacity
        self.counts = Counts()
        device = None if super_device is None else torch.device(super_device)
        self.plan = Plan(
            SuperModel(super_, device, on_super_error, super_timeout),
            super_inputs,
            trim,
            tuple(buckets),
            None if capacity is None else modes.as_capacity(capacity),
            self.counts,
        )
        self.backbone = backbones.find(swift)
        self.router = router
        head = self.backbone.head
        router.to(self.device if head is None else head.weight.device)

        columns = contract.swift_columns(swift, super_, label_map)
        self.counts.to(router.threshold.device)
        permutation = None if columns == sorted(columns) else torch.tensor(columns, device=router.threshold.device)
        self.register_buffer("_permutation", permutation, persistent=False)
        self.label_map = label_map
        self.config = contract.config_of(swift, super_, columns)
        self._output_class = contract.annotated_output(super_)
        parameters = chain(_parameters(super_), _parameters(swift), (router.threshold,))
        # In a tuple: a parameter that is an attribute is registered, and would be in the state twice.
        self._typed = (next(p for p in parameters if p.is_floating_point()),)
        self.training = False
        self.graph_memory = graph_memory
        self.graphs = cuda_graph.Graphs(self.plan, graph_memory or cuda_graph.MEMORY)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,  # [N, M]
        attention_mask: Tensor | None = None,  # [N, M]
        token_type_ids: Tensor | None = None,  # [N, M]
        position_ids: Tensor | None = None,  # [N, M] or [1, M]
        inputs_embeds: Tensor | None = None,  # [N, M, H]
        labels: Tensor | None = None,  # [N] int64
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Answer every row, in input order. Both models get whatever is given beside `labels` and the output options.

        Raises:
            ValueError: `output_attentions`, `output_hidden_states` or `use_cache` asked for (the two models' cannot
                be merged), or a model's output has the wrong shape.
            RuntimeError: Swift or Super is in training mode.
        """
        if output_attentions or output_hidden_states or inputs.get("use_cache"):
            raise ValueError("output_attentions, output_hidden_states, use_cache: of two models only the logits merge")
        self.check_eval()
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        inputs = {name: value for name, value in {**named, **inputs}.items() if value is not None}

        mode = modes.choose() if self.dispatch == "auto" else self.dispatch
        if mode == GRAPH:
            logits, score, order, n_routed = self.graphs(self, inputs)
            outputs: tuple[Any, ...] = ()
            overflow = degraded = None
        else:
            route = self.decide(inputs)
            of_mode = MODES[mode]
            # Read here and nowhere deeper: this is where a compiled joint model breaks its graph, in two and no more.
            read = modes.read_between_graphs if torch.compiler.is_compiling() else modes.read
            count = None if of_mode.size_of is None else read(of_mode, route, inputs, self.plan)
            logits, outputs, overflow, degraded = of_mode.run(route, inputs, self.plan, count)
            _, score, order, n_routed = route
        # One dtype whoever answered: under autocast Super answers in another than its own.
        if logits.dtype != (dtype := self.dtype):
            logits = logits.to(dtype)
        loss = None if labels is None else F.cross_entropy(logits, labels.to(logits.device).view(-1))
        kind = type(outputs[0]) if outputs else None
        output_class = kind if kind is not None and issubclass(kind, ModelOutput) else self._output_class
        answer = output_class(loss=loss, logits=logits)
        if return_dict is False:
            return answer.to_tuple()
        mode = mode if self.backbone.head is not None else f"{mode}+route_logits"
        answer.routing = self._record(Routing(score, order, n_routed, overflow, degraded, mode), outputs)
        return answer

    @torch.no_grad()
    def warmup(self, **inputs: Any) -> cuda_graph.Memory:
        """Build the CUDA graph for inputs of these shapes, given as to a call, now rather than with their first batch.

        Returns:
            What it takes of the device; `.graphs.memory` has it for all.

        Raises:
            ValueError: another mode than "graph", which has nothing to build.
            RuntimeError, MemoryError: as the first call would.
        """
        if self.dispatch != GRAPH:
            raise ValueError(f"dispatch: got {self.dispatch!r}, wanted 'graph': no other mode has anything to build")
        self.check_eval()
        others = ("labels", "return_dict", "output_attentions", "output_hidden_states")  # that the models do not get
        given = {name: value for name, value in inputs.items() if value is not None and name not in others}
        return self.graphs.build(self, given)

    def check_eval(self) -> None:
        """Raises RuntimeError if a model is in training mode, where it would answer at random."""
        contract.check_eval(*self._models)

    def decide(self, inputs: dict[str, Any]) -> Route:
        """Swift's decision about every row, its logits in Super's label order."""
        hidden, head = backbones.logits_of(self.backbone.run(**inputs)), self.backbone.head
        if head is None:
            route = self.router.from_logits(hidden)
        elif hidden.dim() == 2 and hidden.shape[1] == head.in_features:
            route = self.router(hidden, head.weight, head.bias)
        else:
            raise ValueError(
                f"swift: got {list(hidden.shape)} as the input of its head, wanted [N, {head.in_features}]: "
                "its forward does more after the head than to pick positions, see elang.register_backbone"
            )
        return route if self._permutation is None else route._replace(logits=route.logits[:, self._permutation])

    def _record(self, routing: Routing, outputs: tuple[Any, ...]) -> Any:
        """What becomes `.routing`, of what was decided here and what Super returned."""
        return routing

    @property
    def stats(self) -> Stats:
        """What has been answered so far, by whom. Synchronizes: yes; nothing that counts does."""
        return self.counts.read()

    @property
    def device(self) -> torch.device:
        """Where inputs go: Swift's device."""
        return next(chain(_parameters(self.swift), (self.router.threshold,))).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits: Super's, or Swift's if Super has no parameters to tell."""
        return self._typed[0].dtype

    def can_generate(self) -> bool:
        return False

    def save_pretrained(self, folder: str | Path, **kwargs: Any) -> None:
        """Write both models (`swift/`, `super/`, safetensors) and `elang.json`: router, dispatch and label settings.

        `super_inputs` is code and `super_device` belongs to a machine: pass them to `from_pretrained` again.
        `kwargs` go to both models' `save_pretrained`.

        Raises:
            TypeError: a model without `save_pretrained`.
        """
        folder = Path(folder)
        for name, model in self._models:
            if not hasattr(model, "save_pretrained"):
                raise TypeError(f"{name}: got {type(model).__name__}, wanted a model with save_pretrained")
        threshold = self.router.threshold.item()
        settings = {
            "router": {
                "score": self.router.score,
                # JSON has no infinity; every finite float32 survives it exactly.
                "threshold": threshold if math.isfinite(threshold) else str(threshold),
                "temperature": self.router.temperature,
            },
            "joint": {
                "dispatch": self.dispatch,
                "label_map": None if self.label_map is None else list(self.label_map.items()),
                "trim": self.plan.trim,
                "capacity": self.capacity,
                "graph_memory": self.graph_memory,
                "buckets": None if self.plan.buckets == BUCKETS else self.plan.buckets,
                "on_super_error": self.plan.super_.on_error,
                "super_timeout": self.plan.super_.timeout,
            },
            "super_inputs": self.plan.super_inputs is not None,
        }
        text = json.dumps(settings, indent=2) + "\n"
        self.swift.save_pretrained(folder / "swift", **kwargs)
        self.super_.save_pretrained(folder / "super", **kwargs)
        (folder / SETTINGS).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dispatch: str | None = None,
        super_inputs: SuperInputs | None = None,
        super_device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> JointClassifier:
        """Read what `save_pretrained` wrote. `kwargs` go to both models' `from_pretrained`.

        Args:
            dispatch: another mode than the saved one, without its settings.

        Raises:
            ValueError: the pair was saved with a `super_inputs` and none is given.
        """
        folder = Path(folder)
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        if settings["super_inputs"] and super_inputs is None:
            raise ValueError("super_inputs: got None, wanted the function that this pair was saved with")
        router, joint = settings["router"], settings["joint"]
        if joint["label_map"] is not None:
            joint["label_map"] = dict(joint["label_map"])
        swift, super_ = (
            AutoModelForSequenceClassification.from_pretrained(folder / name, use_safetensors=True, **kwargs)
            for name in ("swift", "super")
        )
        router["threshold"] = float(router["threshold"])
        if dispatch is not None:
            joint |= {"dispatch": dispatch, "capacity": None, "buckets": None, "graph_memory": None}
        return cls(swift, super_, Router(**router), super_inputs=super_inputs, super_device=super_device, **joint)


def _check_dispatch(
    dispatch: str, capacity: int | float | None, buckets: Sequence[int], graph_memory: int | None
) -> None:
    known = ("auto", *MODES, GRAPH)
    if dispatch not in known:
        raise ValueError(f"dispatch: got {dispatch!r}, wanted one of {', '.join(known)}")
    if capacity is None:
        if dispatch == "capacity":
            raise ValueError("capacity: got None, wanted the rows or the share of the batch that Super is to see")
    elif dispatch not in ("auto", "capacity"):
        raise ValueError(f"capacity: got {capacity} with dispatch={dispatch!r}, wanted it with 'capacity' or 'auto'")
    elif not capacity >= 0 or (not isinstance(capacity, Integral) and not capacity <= 1):
        raise ValueError(f"capacity: got {capacity}, wanted rows (int) or a share of the batch (0.0 to 1.0)")
    if not buckets or list(buckets) != sorted(set(buckets)) or buckets[0] < 1:
        raise ValueError(f"buckets: got {tuple(buckets)}, wanted sizes >= 1, ascending")
    if tuple(buckets) != BUCKETS and dispatch not in ("auto", "bucket", GRAPH):
        raise ValueError(f"buckets: got some with dispatch={dispatch!r}, wanted them with 'bucket', 'graph' or 'auto'")
    if graph_memory is not None and (dispatch != GRAPH or graph_memory < 1):
        raise ValueError(f"graph_memory: got {graph_memory} with dispatch={dispatch!r}, wanted bytes, with 'graph'")
    if dispatch == GRAPH:
        if len(buckets) >= cuda_graph.MAX_BUCKETS:
            raise ValueError(f"buckets: got {len(buckets)}, wanted fewer than {cuda_graph.MAX_BUCKETS} with 'graph'")
        if why := cuda_graph.obstacle():
            raise RuntimeError(f"dispatch: 'graph' cannot run here: {why}; dispatch='exact' can")


def _parameters(model: Any) -> Iterator[Tensor]:
    return model.parameters() if isinstance(model, nn.Module) else iter(())
