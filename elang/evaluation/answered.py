"""What a pair answered, row by row: all that a report is made of. Saved as JSON."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from typing_extensions import Self

from elang.calibration.artefact import Artefact, Float32, Provenance

FILE = "rows.json"  # in the folder of a run


class AnsweredRows(Artefact):
    """N rows of a task and what both models made of them: columns, one entry a row."""

    version: Literal[1] = 1
    command: tuple[str, ...]  # that wrote this
    task: str
    kind: str  # of the task: `elang.evaluation.tasks.Kind`
    labels: tuple[str, ...]  # of the task; none where answers are free text
    score: str  # that the joint model decides by
    temperature: float  # of the scores
    thresholds: tuple[Float32, ...]  # that were asked for
    id: tuple[str, ...]
    text: tuple[str, ...]  # as read
    target: tuple[str, ...]  # what is right
    swift: tuple[str, ...]  # what each model answered
    super: tuple[str, ...]
    swift_right: tuple[bool, ...]  # as Super where `judged_by` is "super"
    super_right: tuple[bool, ...]
    judged_by: Literal["target", "super"]  # by Super: the task judges no row by itself (translations, similarities)
    scores: dict[str, tuple[float | None, ...]]  # Swift's, by name; None: not finite
    swift_flops: tuple[int, ...]  # of a row that stays with Swift, at its own length
    gate_flops: dict[str, tuple[int, ...]]  # by score: what Swift has spent on a row before it is routed
    super_flops: tuple[int, ...]
    provenance: Provenance

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        n = len(self.id)
        names = ("text", "target", "swift", "super", "swift_right", "super_right", "swift_flops", "super_flops")
        columns = {name: getattr(self, name) for name in names}
        columns |= {f"scores.{name}": values for name, values in self.scores.items()}
        columns |= {f"gate_flops.{name}": values for name, values in self.gate_flops.items()}
        for name, values in columns.items():
            if len(values) != n:
                raise ValueError(f"{name}: got {len(values)} rows, wanted {n} as in id")
        for name in (self.score, *self.gate_flops):
            if name not in self.scores:
                raise ValueError(f"scores: got {', '.join(self.scores)}, wanted {name!r} too")
        return self

    def score_values(self, name: str) -> NDArray[np.float32]:  # [N], NaN: not finite
        return np.array([np.nan if value is None else value for value in self.scores[name]], dtype=np.float32)
