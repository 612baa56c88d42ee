"""A whole inference as one CUDA graph: `graph` dispatch.

For each shape of inputs Swift, the decision and the merge are captured once, and Super once for each bucket of rows. A
conditional node picks the bucket on the device (csrc/cuda/graph.cpp): an inference is one launch, nothing is read on
the host, and where nothing is routed no kernel of Super runs. Threshold, inputs and weights may change in place.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, Protocol
from weakref import finalize

import torch
from torch import Tensor, nn

from elang import backend, dispatch, ops
from elang.dispatch import Plan
from elang.reference import Route

MEMORY = 4 << 30  # bytes that the graphs of one joint model may take, unless it is told otherwise
MAX_BUCKETS = 64  # csrc/cuda/launch.h
WARM_UPS = 2  # runs before a capture, in which libraries choose and allocate what they will keep

RANDOM_TRIES = 3  # that random numbers were drawn may be another thread's doing, but not each time

_building = threading.Lock()
_log = logging.getLogger(__name__)


class Inference(NamedTuple):
    logits: Tensor  # [N, C] of both models, merged, in Super's dtype
    score: Tensor  # as in Route
    order: Tensor
    n_routed: Tensor


class Memory(NamedTuple):
    """What the graph for one shape of inputs takes of the device."""

    inputs: str
    swift: int  # bytes of Swift, the decision and the merge
    buckets: dict[int, int]  # rows of Super's batch -> bytes past those of the larger buckets, whose memory it shares
    seconds: float  # that building it took

    @property
    def total(self) -> int:
        return self.swift + sum(self.buckets.values())


def obstacle() -> str | None:
    """Why no graph can be launched in this process; None: it can."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA device"
    if why := backend.cuda_obstacle():
        return why
    try:
        import_module("elang._C").graph_nodes(str(backend.LIBRARY))
    except RuntimeError as error:
        return str(error)
    return None


def sizes_of(rows: int, buckets: tuple[int, ...]) -> list[int]:
    """The buckets of a batch of so many rows, ascending: each that it is larger than, and itself."""
    return [size for size in buckets if size < rows] + [rows]


class Weights:
    """Where the parameters and buffers of a module lie, and whether they still lie there.

    Holds on to that memory: what a graph reads cannot become somebody else's while it is launched.
    """

    def __init__(self, module: Model | nn.Module) -> None:
        self._entries = [d for m in module.modules() for d in (m._parameters, m._buffers, m._modules) if d]
        self._seen = list(self._now())
        self._tensors = [leaf for entry in self._seen if isinstance(entry, Tensor) for leaf in _leaves(entry)]
        self._storages = [tensor.untyped_storage() for tensor in self._tensors]
        self._addresses = [tensor.data_ptr() for tensor in self._tensors]

    def _now(self) -> Iterator[Any]:
        return chain.from_iterable(d.values() for d in self._entries)

    def replaced(self) -> bool:
        """Whether any lies elsewhere now, or a submodule is another. Values that changed in place are not meant."""
        now = list(self._now())
        if len(now) != len(self._seen) or not all(map(is_, now, self._seen)):
            return True
        return [tensor.data_ptr() for tensor in self._tensors] != self._addresses


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold the data: of a quantised weight, say, its codes and scales."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from _leaves(getattr(tensor, name))
    else:
        yield tensor


class Cuda:
    """Captures and launches on one device, one launch after the other: all graphs share one pool of memory.

    Args:
        nodes: "switch" or "if", to have the bucket picked by conditional nodes of this kind; None: the best there are.
    """

    def __init__(self, device: torch.device, nodes: str | None = None) -> None:
        if device.type != "cuda":
            raise RuntimeError(f"dispatch: 'graph' cannot run on {device}, wanted a CUDA device; dispatch='exact' can")
        self.device = device
        self._with_switch = (nodes or import_module("elang._C").graph_nodes(str(backend.LIBRARY))) == "switch"
        self._pool = torch.cuda.graph_pool_handle()
        # torch deals out streams in turn, each to many: of this priority nobody else's may be.
        self._capturing = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        # Another, so that what a library allocates for its stream for good is the pool's.
        self._warming = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._launched: torch.cuda.Stream | None = None  # where the last launch went
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # recorded behind it

    def warm_up(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._warming.wait_stream(current)
        with torch.cuda.stream(self._warming):
            for _ in range(WARM_UPS):
                result = run()
        current.wait_stream(self._warming)
        return result

    def random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device)]

    def capture(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any, int]:
        """The graph of what `run` launches, its result, and the bytes by which the pool has grown."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        before = self._pool_bytes()
        try:
            # The outer block puts the stream back where the end of a capture that failed does not.
            with (
                torch.cuda.stream(self._capturing),
                torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"),
            ):
                result = run()
        except Exception:
            with suppress(RuntimeError):  # torch, depending on its version, has done this or forgotten it
                torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
            raise
        return graph, result, self._pool_bytes() - before

    def _pool_bytes(self) -> int:
        segments = torch.cuda.memory_snapshot()  # type: ignore[no-untyped-call]
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))

    def compose(
        self,
        decide: torch.cuda.CUDAGraph,
        bodies: dict[int, torch.cuda.CUDAGraph],
        merge: torch.cuda.CUDAGraph,
        n_routed: Tensor,
        counts: Tensor,
        batches: Tensor,
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> Any:
        return import_module("elang._C").Graph(
            library=str(backend.LIBRARY),
            device=self.device.index,
            decide=decide.raw_cuda_graph(),
            bodies=[(size, bodies[size].raw_cuda_graph()) for size in sorted(bodies)],
            merge=merge.raw_cuda_graph(),
            with_switch=self._with_switch,
            rows=max(bodies),
            n_routed=n_routed.data_ptr(),
            counts=counts.data_ptr(),
            batches=batches.data_ptr(),
            inputs=[(tensor.data_ptr(), tensor.nbytes) for tensor in inputs],
            outputs=[(tensor.data_ptr(), tensor.nbytes) for tensor in outputs],
        )

    def launch(self, graph: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._launched is not None and stream != self._launched:
            stream.wait_event(self._done)
        graph.launch([tensor.data_ptr() for tensor in inputs], [tensor.data_ptr() for tensor in outputs])
        self._done.record(stream)
        self._launched = stream

    def wait(self) -> None:
        """Until the last launch is done."""
        self._done.synchronize()


class _Uncapturable(RuntimeError):
    pass


class _Captured(NamedTuple):
    graph: Any
    outputs: list[Tensor]  # where the graph leaves its Inference
    sizes: list[int]
    batches: Tensor  # [len(sizes)] int64
    held: tuple[Any, ...]  # what else it reads and writes
    memory: Memory


class Model(Protocol):
    """What is captured: a joint model."""

    @property
    def router(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    def decide(self, inputs: dict[str, Any]) -> Route: ...
    def modules(self) -> Iterator[nn.Module]: ...


class Graphs:
    """The graphs of one joint model, each for inputs of one shape: built by the first such call, or ahead by `build`.

    Weights that were replaced (`.to()`, a new submodule, `load_state_dict(assign=True)`) are noticed behind each
    launch, while the device is busy: the graphs are then built anew. Of a model that is no `nn.Module` nothing is
    known: what it reads has to stay where it is.

    Args:
        plan: buckets, Super, its inputs and the counts.
        memory: bytes that all graphs may take together of the pool that they share.
    """

    def __init__(self, plan: Plan, memory: int = MEMORY) -> None:
        self._plan = plan
        self._memory = memory
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._settle: finalize[Any, Graphs] | None = None  # waits for the last launch
        self._weights: Weights | None = None
        self._captured: dict[Any, _Captured] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to a process and its device: a copy builds its own.
        return {"_plan": self._plan, "_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def memory(self) -> list[Memory]:
        """What each graph takes of the device."""
        with self._lock:
            return [captured.memory for captured in self._captured.values()]

    def build(self, model: Model, inputs: dict[str, Any]) -> Memory:
        """Build the graph for inputs of these shapes, if there is none yet. Raises what a call does."""
        inputs = dict(sorted(inputs.items()))
        key = self._key(model, inputs)
        with self._lock:
            return self._graph(model, key, inputs).memory

    @torch.compiler.disable(reason="dispatch='graph' launches a graph of its own")  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, model: Model, inputs: dict[str, Any]) -> Inference:
        """Queue one inference on the current stream. Synchronizes: only to build a graph.

        Raises:
            RuntimeError: no CUDA device; within another graph; a model that draws random numbers or cannot be captured.
            ValueError: inputs that are not on the device, or neither tensors nor constants.
            MemoryError: the graph would go past the cap.
        """
        inputs = dict(sorted(inputs.items()))
        key = self._key(model, inputs)
        tensors = [value.contiguous() for value in inputs.values() if isinstance(value, Tensor)]
        if any(len(tensor) == 0 for tensor in tensors if tensor.dim()):
            route = model.decide(inputs)
            if len(route.order) == 0:
                return Inference(*route)
        with self._lock:
            captured = self._graph(model, key, inputs)
            answer = self._launch(captured, tensors)
            if self._weights is not None and self._weights.replaced():
                _log.warning("weights were replaced: the CUDA graphs are built anew")
                self._uncount(captured, answer)
                self._drop()
                answer = self._launch(self._graph(model, key, inputs), tensors)
        return answer

    def _launch(self, captured: _Captured, tensors: list[Tensor]) -> Inference:
        outputs = [torch.empty_like(tensor) for tensor in captured.outputs]
        self._runtime.launch(captured.graph, tensors, outputs)
        return Inference(*outputs)

    def _uncount(self, captured: _Captured, answer: Inference) -> None:
        """Take back what a launch that does not count has counted."""
        n, zero = answer.n_routed, torch.zeros_like(answer.n_routed)
        assert self._plan.counts is not None, "a joint model counts"
        self._plan.counts.add_on_device(-len(answer.order), -n, zero)
        bucket = torch.searchsorted(torch.tensor(captured.sizes, device=n.device), n)
        captured.batches.scatter_add_(0, bucket, -(n > 0).long())

    def _drop(self) -> None:
        if self._settle is not None:
            self._settle()
        self._captured.clear()
        self._runtime = self._settle = self._weights = None

    def _key(self, model: Model, inputs: dict[str, Any]) -> Any:
        """Everything that a graph takes as given."""
        if dispatch.in_one_graph():
            raise RuntimeError(
                "dispatch: 'graph' launches a graph of its own, which cannot be part of one under export or capture; "
                "dispatch='capacity' can"
            )
        device, super_device = model.device, self._plan.super_.device
        if super_device is not None and _with_index(super_device) != device:
            raise RuntimeError(
                f"super_device: got {super_device}, wanted Swift's {device}, as a graph is of one device; "
                "dispatch='exact' can have two"
            )
        autocast = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
        key: list[Any] = [model.router.score, model.router.temperature, *autocast]
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                if value.device != device:
                    raise ValueError(f"{name}: got a tensor on {value.device}, wanted one on {device}")
                key.append((name, value.shape, value.dtype))
            elif isinstance(value, bool | int | float | str):
                key.append((name, type(value), value))
            else:
                raise ValueError(f"{name}: got {type(value).__name__}, wanted a tensor, a number, a bool or a string")
        return tuple(key)

    def _graph(self, model: Model, key: Any, inputs: dict[str, Any]) -> _Captured:
        if self._runtime is not None and self._runtime.device != model.device:
            self._drop()
        if key not in self._captured:
            if not self._captured:
                self._runtime = Cuda(model.device)
                # Nobody may have the memory of a graph that still runs.
                self._settle = finalize(self, self._runtime.wait)
                self._settle.atexit = False
                self._weights = Weights(model)
            try:
                # torch captures one graph at a time. Nothing made here may be an inference tensor: it is written later.
                with _building, _without_autocast_cache(), torch.inference_mode(False), torch.no_grad():
                    self._captured[key] = self._build(model, inputs)
            except _Uncapturable:
                self._drop()  # what a failed capture leaves of the pool serves nobody
                raise
        return self._captured[key]

    def _build(self, model: Model, inputs: dict[str, Any]) -> _Captured:
        begin, run, counts = time.perf_counter(), self._runtime, self._plan.counts
        assert counts is not None, "a joint model counts"
        own = {
            name: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        tensors = {name: value for name, value in own.items() if isinstance(value, Tensor)}
        described = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        taken = sum(captured.memory.total for captured in self._captured.values())
        mine = 0

        def capture(of: str, part: Callable[[], Any]) -> tuple[Any, Any, int]:
            nonlocal mine
            try:
                graph, result, grown = run.capture(part)
            except Exception as error:
                message = f"{of}: cannot be captured as a CUDA graph, dispatch='exact' can run it: {error}"
                raise _Uncapturable(message) from error
            mine += grown
            if taken + mine > self._memory:
                raise MemoryError(
                    f"graph_memory: got {self._memory} bytes, of which other graphs take {taken}, wanted at least "
                    f"{mine} for {described}: raise it, pad to fewer lengths, or name fewer buckets"
                )
            return graph, result, grown

        route = self._warmed_up("swift", lambda: model.decide(own))
        # `later` has no values before a launch: until then what follows a decision follows `route`.
        decide, later, swift_bytes = capture("swift", lambda: model.decide(own))
        sizes = sizes_of(len(route.order), self._plan.buckets)
        routed = torch.empty_like(self._warmed_up("super_", partial(self._answers, route, own, sizes[-1])))

        def body(size: int) -> None:
            routed[:size].copy_(self._answers(later, own, size))

        def merged_by(route: Route) -> Tensor:
            return ops.merge_rows(route.logits, routed, route.order, route.n_routed)

        bodies: dict[int, Any] = {}
        memory: dict[int, int] = {}
        # The largest first, so that the others find its memory free.
        for size in _with_progress(sizes[::-1], f"CUDA graph for {described}"):
            self._warmed_up("super_", partial(self._answers, route, own, size))
            bodies[size], _, memory[size] = capture("super_", partial(body, size))
        run.warm_up(partial(merged_by, route))
        merge, merged, merge_bytes = capture("merge_rows", partial(merged_by, later))
        batches = counts.batches_on_device(sizes)
        outputs = [merged, later.score, later.order, later.n_routed]
        own_inputs = list(tensors.values())
        graph = run.compose(decide, bodies, merge, later.n_routed, counts.on_device, batches, own_inputs, outputs)
        seconds = time.perf_counter() - begin
        used = Memory(described, swift_bytes + merge_bytes, dict(sorted(memory.items())), seconds)
        _log.info("CUDA graph for %s: %d buckets, %d bytes, %.1f s", described, len(sizes), used.total, seconds)
        return _Captured(graph, outputs, sizes, batches, (later, routed, own, decide, bodies, merge), used)

    def _answers(self, route: Route, inputs: dict[str, Any], size: int) -> Tensor:
        """Super's logits [size, C] for the routed rows and copies of the last."""
        plan = self._plan
        of_super = dispatch.gathered(route, inputs, plan, size)
        reply = plan.super_.once(of_super, size, route.logits.shape[1], route.logits.device)
        assert reply.logits is not None, "once raises what fails"
        return reply.logits

    def _warmed_up(self, model: str, run: Callable[[], Any]) -> Any:
        for _ in range(RANDOM_TRIES):
            before = self._runtime.random_state()
            result = self._runtime.warm_up(run)
            if all(map(torch.equal, before, self._runtime.random_state())):
                return result
        raise RuntimeError(
            f"{model}: draws random numbers, of which a CUDA graph would draw the same at each launch; "
            "dispatch='exact' can run it"
        )


def _with_index(device: torch.device) -> torch.device:
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


@contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """A cast that was cached before a capture would be read by its graph, long after the cache is gone."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _with_progress(sizes: list[int], described: str) -> Any:
    from rich.console import Console
    from rich.progress import track

    return track(sizes, described, console=Console(stderr=True), transient=True)
