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
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from elang import backend, dispatch, ops
from elang.dispatch import Plan
from elang.reference import Route

MEMORY = 4 << 30  # bytes that the graphs of one joint model may take, unless it is told otherwise
MAX_BUCKETS = 64  # csrc/cuda/launch.h
WARM_UPS = 2  # runs before a capture, in which libraries choose and allocate what they will keep

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

    def __init__(self, module: nn.Module) -> None:
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
        self._capturing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._launched: torch.cuda.Stream | None = None  # where the last launch went
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]  # recorded behind it

    def warm_up(self, run: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._capturing.wait_stream(current)
        with torch.cuda.stream(self._capturing):
            for _ in range(WARM_UPS):
                result = run()
        current.wait_stream(self._capturing)
        return result

    def random_state(self) -> list[Tensor]:
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device)]

    def capture(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any, int]:
        """The graph of what `run` launches, its result, and the bytes by which the pool has grown."""
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        with torch.cuda.graph(graph, self._pool, self._capturing, capture_error_mode="thread_local"):
            result = run()
        return graph, result, torch.cuda.memory_reserved(self.device) - before

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


class _Captured(NamedTuple):
    graph: Any
    outputs: list[Tensor]  # where the graph leaves its Inference
    held: tuple[Any, ...]  # what else it reads and writes
    memory: Memory


class Graphs:
    """The graphs of one joint model: a callable from its inputs to an `Inference`.

    Built by the first call with inputs of a shape, or ahead by `build`. Weights that were replaced (`.to()`, a new
    submodule, `load_state_dict(assign=True)`) are noticed behind each launch, while the device is busy: the graphs are
    then built anew.

    Args:
        decide: inputs -> Route, as the joint model decides.
        plan: buckets, Super, its inputs and the counts.
        module: whose weights the graphs read.
        memory: bytes that all graphs may take together.
    """

    def __init__(
        self, decide: Callable[[dict[str, Any]], Route], plan: Plan, module: nn.Module, memory: int = MEMORY
    ) -> None:
        self._decide = decide
        self._plan = plan
        self._module = module
        self._memory = memory
        self._forget()

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._runtime: Any = None
        self._weights: Weights | None = None
        self._captured: dict[Any, _Captured] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to a process and its device: a copy builds its own.
        return {name: self.__dict__[name] for name in ("_decide", "_plan", "_module", "_memory")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def memory(self) -> list[Memory]:
        """What each graph takes of the device."""
        with self._lock:
            return [captured.memory for captured in self._captured.values()]

    def build(self, inputs: dict[str, Any], device: torch.device, *settings: Any) -> Memory:
        """Build the graph for inputs of these shapes, if there is none yet. Raises what a call does."""
        key = self._key(inputs, device, settings)
        with self._lock:
            return self._graph(key, inputs, device).memory

    @torch.compiler.disable(reason="dispatch='graph' launches a graph of its own")  # type: ignore[no-untyped-call, untyped-decorator]
    def __call__(self, inputs: dict[str, Any], device: torch.device, *settings: Any) -> Inference:
        """Queue one inference on the current stream. Synchronizes: only to build a graph.

        Args:
            settings: what else `decide` takes as given; with others a graph is another.

        Raises:
            RuntimeError: no CUDA device; within another graph; a model that draws random numbers or cannot be captured.
            ValueError: inputs that are not on the device, or neither tensors nor constants.
            MemoryError: the graph would go past the cap.
        """
        key = self._key(inputs, device, settings)
        tensors = [value.contiguous() for value in inputs.values() if isinstance(value, Tensor)]
        if any(len(tensor) == 0 for tensor in tensors if tensor.dim()):
            return Inference(*self._decide(inputs))
        with self._lock:
            answer = self._launch(key, inputs, tensors, device)
            if self._weights is not None and self._weights.replaced():
                _log.warning("weights were replaced: the CUDA graphs are built anew")
                self._runtime.wait()
                self._captured.clear()
                answer = self._launch(key, inputs, tensors, device)
        return answer

    def _launch(self, key: Any, inputs: dict[str, Any], tensors: list[Tensor], device: torch.device) -> Inference:
        captured = self._graph(key, inputs, device)
        outputs = [torch.empty_like(tensor) for tensor in captured.outputs]
        self._runtime.launch(captured.graph, tensors, outputs)
        return Inference(*outputs)

    def _key(self, inputs: dict[str, Any], device: torch.device, settings: tuple[Any, ...]) -> Any:
        """Everything that a graph takes as given."""
        if dispatch.in_one_graph():
            raise RuntimeError(
                "dispatch: 'graph' launches a graph of its own, which cannot be part of one under export or capture; "
                "dispatch='capacity' can"
            )
        super_device = self._plan.super_.device
        if super_device is not None and super_device != device:
            raise RuntimeError(
                f"super_device: got {super_device}, wanted Swift's {device}, as a graph is of one device; "
                "dispatch='exact' can have two"
            )
        key = [*settings, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)]
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                if value.device != device:
                    raise ValueError(f"{name}: got a tensor on {value.device}, wanted one on {device}")
                key.append((name, value.shape, value.dtype))
            else:
                try:
                    hash(value)
                except TypeError:
                    raise ValueError(
                        f"{name}: got {type(value).__name__}, wanted a tensor or a constant, which a graph keeps"
                    ) from None
                key.append((name, value))
        return tuple(key)

    def _graph(self, key: Any, inputs: dict[str, Any], device: torch.device) -> _Captured:
        if key not in self._captured:
            if self._runtime is None or self._runtime.device != device:
                self._captured.clear()
                self._runtime = Cuda(device)
            if not self._captured:
                self._weights = Weights(self._module)
            with _without_autocast_cache():
                self._captured[key] = self._build(inputs)
        return self._captured[key]

    def _build(self, inputs: dict[str, Any]) -> _Captured:
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

        def capture(part: Callable[[], Any]) -> tuple[Any, Any, int]:
            nonlocal mine
            graph, result, grown = run.capture(part)
            mine += grown
            if taken + mine > self._memory:
                raise MemoryError(
                    f"graph_memory: got {self._memory} bytes, of which other graphs take {taken}, wanted at least "
                    f"{mine} for {described}: raise it, pad to fewer lengths, or name fewer buckets"
                )
            return graph, result, grown

        route = self._warmed_up("swift", lambda: self._decide(own))
        decide, later, swift_bytes = capture(lambda: self._decide(own))  # `later` has no values before a launch
        sizes = sizes_of(len(route.order), self._plan.buckets)
        routed = torch.empty_like(self._warmed_up("super_", partial(self._answers, route, own, sizes[-1])))

        def body(size: int) -> None:
            routed[:size].copy_(self._answers(later, own, size))

        bodies: dict[int, Any] = {}
        memory: dict[int, int] = {}
        # The largest first, so that the others find its memory free.
        for size in _with_progress(sizes[::-1], f"CUDA graph for {described}"):
            self._warmed_up("super_", partial(self._answers, route, own, size))
            bodies[size], _, memory[size] = capture(partial(body, size))
        merge, merged, merge_bytes = capture(lambda: ops.merge_rows(later.logits, routed, later.order, later.n_routed))
        batches = counts.batches_on_device(sizes)
        outputs = [merged, later.score, later.order, later.n_routed]
        own_inputs = list(tensors.values())
        graph = run.compose(decide, bodies, merge, later.n_routed, counts.on_device, batches, own_inputs, outputs)
        seconds = time.perf_counter() - begin
        used = Memory(described, swift_bytes + merge_bytes, dict(sorted(memory.items())), seconds)
        _log.info("CUDA graph for %s: %d buckets, %d bytes, %.1f s", described, len(sizes), used.total, seconds)
        return _Captured(graph, outputs, (later, routed, own, batches, decide, bodies, merge), used)

    def _answers(self, route: Route, inputs: dict[str, Any], size: int) -> Tensor:
        """Super's logits [size, C] for the routed rows and copies of the last."""
        plan = self._plan
        of_super = dispatch.gathered(route, inputs, plan, size)
        reply = plan.super_.once(of_super, size, route.logits.shape[1], route.logits.device)
        assert reply.logits is not None, "once raises what fails"
        return reply.logits

    def _warmed_up(self, model: str, run: Callable[[], Any]) -> Any:
        before = self._runtime.random_state()
        result = self._runtime.warm_up(run)
        if any(not torch.equal(a, b) for a, b in zip(before, self._runtime.random_state(), strict=True)):
            raise RuntimeError(
                f"{model}: draws random numbers, of which a CUDA graph would draw the same at each launch; "
                "dispatch='exact' can run it"
            )
        return result


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
