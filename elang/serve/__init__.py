"""Serving a pair of models: micro-batching for many requests in one process."""

from elang.serve.batcher import Batcher
from elang.serve.pair import Rows
from elang.serve.requests import Answer, BatcherStats, Busy, Closed
from elang.serve.rows import EncodedRows, TextRows, text_batcher

__all__ = ["Answer", "Batcher", "BatcherStats", "Busy", "Closed", "EncodedRows", "Rows", "TextRows", "text_batcher"]
