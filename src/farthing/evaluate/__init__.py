"""Evaluation: held-out questions, outcomes that are never merged, intervals, paired gains."""

from farthing.evaluate.ask import evaluate_source
from farthing.evaluate.score import gain, summarise

__all__ = ["evaluate_source", "gain", "summarise"]
