"""What a model is on a task: how it reads the rows, what it answers, how sure it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from elang import contract
from elang.evaluation.metrics import Values
from elang.evaluation.predict import Encoded, longest_input
from elang.evaluation.rows import Rows
from elang.evaluation.tasks import Task
from elang.progress import Report, silent

Columns = dict[str, NDArray[Any]]  # each of N rows
Call = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class TaskModel(ABC):
    """A Hugging Face model in eval mode, behind its tokenizer, on a task."""

    role: str  # "swift" or "super": for messages
    model: Any
    tokenizer: Any
    task: Task

    def __post_init__(self) -> None:
        contract.check_eval((self.role, self.model))
        if self.tokenizer.pad_token is None:
            raise ValueError(f"{self.role}: got a tokenizer without a padding token, wanted one")
        self.check()

    @property
    @abstractmethod
    def scores(self) -> tuple[str, ...]:
        """What Swift can be routed by."""

    @property
    @abstractmethod
    def op(self) -> str:
        """Which op computes the scores."""

    @abstractmethod
    def check(self) -> None:
        """Raises ValueError, which names the role, for a model that cannot answer the task."""

    @abstractmethod
    def encode(self, rows: Rows) -> Encoded:
        """The rows as the model reads them, cut at the longest input that it takes."""

    @abstractmethod
    def answer(self, rows: Rows, texts: Encoded, batch_size: int = 32, report: Report = silent) -> Columns:
        """What is kept of the model's answers, and `flops` [N] of each row alone."""

    @abstractmethod
    def answer_scored(
        self,
        rows: Rows,
        texts: Encoded,
        temperatures: Sequence[float] = (1.0,),
        batch_size: int = 32,
        report: Report = silent,
    ) -> Columns:
        """The same with a column `score.NAME` for each score.

        Scores at the first temperature go by their names, at any other by "NAME@T". `gate_flops.NAME` is what has been
        spent when a score is known, where that is less than `flops`.
        """

    @abstractmethod
    def values(self, rows: Rows, columns: Columns) -> Values:
        """The answers as the task's metrics read them."""

    @abstractmethod
    def joined(self, super_: TaskModel, score: str, threshold: float, temperature: float) -> Any:
        """The joint model of the two, for `run`."""

    def settings(self, rows: Rows) -> list[Any]:
        """On what answers depend, beside weights and tokens."""
        return []

    @property
    def head_sha256(self) -> str | None:
        """Of the energy head, if there is one."""
        return None

    def run(self, model: Any, rows: Rows, batch: dict[str, Tensor]) -> Call:
        """The call that has this model, or a joint one, answer a batch of the rows."""
        return partial(model, **batch)

    def _encoded(self, texts: Sequence[str], second_texts: Sequence[str] | None = None) -> Encoded:
        return Encoded(self.tokenizer, texts, longest_input(self.tokenizer, self.model.config), second_texts)
