"""What a calibration is saved as: JSON that a person can read and compare."""

from __future__ import annotations

import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer
from typing_extensions import Self

from elang import __version__


def _as_float32(value: float) -> float:
    with np.errstate(over="ignore"):
        rounded = float(np.float32(value))
    if math.isnan(rounded) or math.isinf(rounded) != math.isinf(value):
        raise ValueError(f"got {value}, wanted a float32 value or +/-inf")
    return rounded


# A Python float that is exactly a float32, so its shortest decimal form brings back every bit. JSON has no infinity:
# +/-inf are the strings "inf" and "-inf" there.
Float32 = Annotated[
    float,
    Field(allow_inf_nan=True),
    AfterValidator(_as_float32),
    PlainSerializer(lambda t: t if math.isfinite(t) else str(t), when_used="json"),
]


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Provenance(Record):
    """Where a calibration comes from. A threshold means nothing under another model, dtype or backend."""

    swift: str | None = None  # name of the model
    super: str | None = None
    swift_sha256: str | None = None  # of its weights: `elang.fingerprint`
    super_sha256: str | None = None
    head_sha256: str | None = None  # of the energy head, where Swift has one
    data: str | None = None  # name or description of the rows
    data_sha256: str | None = None
    dtype: str | None = None  # in which the scores were computed
    backend: str | None = None  # of the op that computed them: `elang.backend.served`
    library: str = __version__  # of elang
    date: str = Field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))


class Artefact(Record):
    """A record with a file of its own."""

    def save(self, path: str | Path) -> None:
        """Write JSON: one line per field, one line per column of a curve."""
        # A raw newline never occurs inside a JSON string, so this folds arrays of plain values and nothing else.
        text = re.sub(
            r"\[\n([^\[\]{}]*)\n\s*\]",
            lambda array: f"[{' '.join(line.strip() for line in array[1].split(chr(10)))}]",
            self.model_dump_json(indent=2),
        )
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote, bit for bit. Raises ValueError for anything else, such as another version."""
        return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
