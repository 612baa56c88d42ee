"""Super as a dispatcher calls it: any callable, on any device, that may fail."""

from __future__ import annotations

import contextvars
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from elang.backbones import logits_of

OnError = Literal["raise", "swift"]
ON_ERROR = ("raise", "swift")
MAX_LATE = 16

_log = logging.getLogger(__name__)


class Reply(NamedTuple):
    logits: Tensor | None  # [K, C] on the device asked for; None: Super failed, and Swift's answers stand
    outputs: tuple[Any, ...]  # what Super returned: of a batch run in halves, for each of them


class _Late:
    """The calls of one Super that timed out and still run. A copy of it starts with none."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def add(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.append(thread)

    def count(self) -> int:
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            return len(self._threads)

    def __reduce__(self) -> tuple[type[_Late], tuple[()]]:
        return _Late, ()


@dataclass(frozen=True)
class SuperModel:
    """Calls Super on K rows and has its logits [K, C] back.

    A call that runs out of memory is tried once more in two halves (of the tensors with K rows), unless it is part of a
    compiled graph. What fails after that, or takes longer than `timeout` seconds in a call, is raised, or with
    `on_error="swift"` logged and answered with no logits. A call that timed out goes on in a thread of its own,
    unheard: nothing can stop it. While `MAX_LATE` of them do, every call fails at once. An answer of the wrong type or
    shape is always raised.
    """

    model: Callable[..., Any]
    device: torch.device | None = None  # where inputs are sent; None: they stay where they are
    on_error: OnError = "raise"
    timeout: float | None = None
    late: _Late = field(default_factory=_Late, init=False, repr=False, compare=False)

    def __call__(self, inputs: Mapping[str, Any], rows: int, classes: int, home: torch.device) -> Reply:
        if self.guarded:
            reply: Reply = self._guarded(inputs, rows, classes, home)
            return reply
        if torch.compiler.is_compiling():  # where an error is the graph's, and not to be caught
            return self.once(inputs, rows, classes, home)
        return self._whole_or_in_halves(inputs, rows, classes, home)

    @property
    def guarded(self) -> bool:
        """Whether errors are dealt with here, for which a compiled graph has to stop."""
        return self.on_error == "swift" or self.timeout is not None

    @torch.compiler.disable(  # type: ignore[no-untyped-call, untyped-decorator]
        reason="on_super_error='swift' and super_timeout call Super outside of the graph"
    )
    def _guarded(self, inputs: Mapping[str, Any], rows: int, classes: int, home: torch.device) -> Reply:
        try:
            return self._whole_or_in_halves(inputs, rows, classes, home)
        except _Unfit:
            raise
        except Exception:
            if self.on_error == "raise":
                raise
            _log.warning("Super failed on %d rows: Swift's answers stand", rows, exc_info=True)
            return Reply(None, ())

    def _whole_or_in_halves(self, inputs: Mapping[str, Any], rows: int, classes: int, home: torch.device) -> Reply:
        try:
            return self.once(inputs, rows, classes, home)
        except Exception as error:
            if rows < 2 or not _is_out_of_memory(error):
                raise
        # Past the except block, whose error holds on to what the failed call had allocated.
        _log.warning("Super ran out of memory on %d rows: once more in halves", rows)
        torch.cuda.empty_cache()  # nothing without CUDA
        cut = rows // 2
        logits = list[Tensor]()
        outputs: tuple[Any, ...] = ()
        for begin, end in ((0, cut), (cut, rows)):
            try:
                half = self.once(_rows_of(inputs, rows, begin, end), end - begin, classes, home)
            except _UnfitShape as error:
                raise MemoryError(
                    f"super_: out of memory on {rows} rows, which do not come in halves: {error}"
                ) from None
            assert half.logits is not None
            logits.append(half.logits.clone())  # Super may write its next answer where this one lies
            outputs += half.outputs
        return Reply(torch.cat(logits), outputs)

    def once(self, inputs: Mapping[str, Any], rows: int, classes: int, home: torch.device) -> Reply:
        """One call, all of whose errors are the caller's."""
        if self.device is not None:
            inputs = sent(inputs, self.device)
        output = self.model(**inputs) if self.timeout is None else _within(self.timeout, self.model, inputs, self.late)
        try:
            logits = logits_of(output)
        except TypeError as error:
            raise _UnfitType(str(error)) from None
        if logits.shape != (rows, classes):
            raise _UnfitShape(f"super_: got logits {list(logits.shape)} for {rows} rows, wanted [{rows}, {classes}]")
        return Reply(logits.to(home), (output,))


class _Unfit(Exception):
    """A bug of Super's, not a failure: raised whatever `on_error` says."""


class _UnfitShape(_Unfit, ValueError):
    pass


class _UnfitType(_Unfit, TypeError):
    pass


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The CPU's allocator has no type of its own for it.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def sent(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The inputs on Super's device. To a GPU they travel beside the stream that Super runs on, which may be busy with a
    batch before this one; from one they have to have arrived before anybody reads them.
    """
    elsewhere = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.device != device}
    if not elsewhere or device.type != "cuda" or torch.compiler.is_compiling():
        return {**inputs, **{k: v.to(device, non_blocking=device.type == "cuda") for k, v in elsewhere.items()}}
    beside, current = _stream_beside(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(beside):
        there = {k: v.to(device, non_blocking=True) for k, v in elsewhere.items()}
    current.wait_stream(beside)
    for value in there.values():
        value.record_stream(current)
    return {**inputs, **there}


@cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _rows_of(inputs: Mapping[str, Any], rows: int, begin: int, end: int) -> dict[str, Any]:
    """Rows [begin, end) of every tensor that has `rows` of them."""
    return {
        name: v[begin:end] if isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == rows else v
        for name, v in inputs.items()
    }


@contextmanager
def _as_in(state: tuple[bool, bool, list[tuple[str, torch.dtype]], torch.cuda.Stream | None]) -> Iterator[None]:
    """What PyTorch keeps for each thread: gradients, inference mode, autocast and the CUDA stream."""
    grad, inference, autocast, stream = state
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for device, dtype in autocast:
            stack.enter_context(torch.autocast(device, dtype))
        stack.enter_context(torch.cuda.stream(stream))  # None: nothing
        yield


def _within(seconds: float, model: Callable[..., Any], inputs: Mapping[str, Any], late: _Late) -> Any:
    """The model's answer, from a thread that can be left behind.

    Raises:
        TimeoutError: it took longer, or too many that did still run.
    """
    if (still := late.count()) >= MAX_LATE:
        raise TimeoutError(f"super_: {still} calls that timed out still run, no other is made beside them")
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    state = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)],
        torch.cuda.current_stream() if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]
    )

    context = contextvars.copy_context()

    def run() -> None:
        try:
            with _as_in(state):
                answers.put((context.run(model, **inputs), None))
        except BaseException as error:
            answers.put((None, error))

    thread = threading.Thread(target=run, name="elang-super", daemon=True)
    thread.start()
    try:
        output, error = answers.get(timeout=seconds)
    except queue.Empty:
        late.add(thread)
        raise TimeoutError(f"super_: no answer within {seconds:g} s") from None
    try:
        if error is not None:
            raise error
    finally:
        del error  # whose traceback holds this frame
    return output
