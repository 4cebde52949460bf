"""Evaluation: held-out questions, outcomes that are never merged, intervals, paired gains."""
