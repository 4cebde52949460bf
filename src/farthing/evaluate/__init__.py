"""Evaluation: held-out questions, outcomes that are never merged, intervals, paired gains."""

from farthing.evaluate.suite import evaluate_source, gain, summarise

__all__ = ["evaluate_source", "gain", "summarise"]
