"""The figures that the paper prints, to stand beside measured ones."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "E-LANG: Energy-Based Joint Inferencing of Super and Swift Language Models, ACL 2022, arXiv 2203.00748"


@dataclass(frozen=True)
class Published:
    """TinyBERT-4L-312 as Swift (1.2 GFLOPs), BERT-base as Super (21.8 GFLOPs), sequences of 128, development sets.

    Measured by the authors at batch size 1. The table does not say which metric it gives where GLUE has two.
    """

    swift: float  # quality, percent
    super: float
    joint: float
    swift_ratio: float  # rows kept by Swift, percent
    flops_speedup: float  # over Super alone
    time_speedup: float


# By task. The ratio and the speed-ups of MNLI are printed once for both halves.
PUBLISHED = {
    "mnli_matched": Published(82.8, 84.9, 84.7, 64, 2.4, 1.4),
    "mnli_mismatched": Published(82.9, 85.5, 85.4, 64, 2.4, 1.4),
    "qnli": Published(87.9, 92.2, 92.2, 63, 2.4, 1.4),
    "sst2": Published(92.6, 93.5, 93.7, 77, 3.5, 1.8),
    "rte": Published(65.7, 71.1, 73.3, 56, 2.0, 1.3),
    "mrpc": Published(85.8, 87.3, 87.3, 68, 2.7, 1.5),
    "cola": Published(49.7, 60.3, 58.7, 60, 2.2, 1.3),
    "qqp": Published(90.5, 91.5, 91.5, 91, 7.0, 2.2),
}

# As printed: the mean of Swift's column is 79.7.
PUBLISHED_AVERAGE = Published(78.5, 83.3, 83.4, 68, 3.2, 1.6)

# T5-Large as Swift and T5-11B as Super: the average speed-up in computation at Super's quality.
PUBLISHED_T5_SPEEDUP = {"GLUE": 3.3, "SuperGLUE": 2.9}
