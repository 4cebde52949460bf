"""A first recipe for what somebody has: a base, data and a goal, as commented YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from farthing.base.schema import dump_value
from farthing.recipe.editor import SCHEMA_LINE

Goal = Literal["chat", "reason", "both", "scratch"]
GOALS: dict[Goal, str] = {
    "chat": "answer as in given conversations (sft)",
    "reason": "get more questions right, by rewards (grpo)",
    "both": "learn from worked answers, then by rewards (sft, grpo)",
    "scratch": "a new model from text alone (pretrain)",
}

Holds = Literal["conversations", "questions", "text", "nothing"]
FITTING: dict[Holds, tuple[Goal, ...]] = {
    "conversations": ("chat",),
    "questions": ("reason", "both", "chat"),
    "text": ("scratch",),
    "nothing": ("reason",),
}
"""The goals that data which hold such rows allow, the likeliest first."""

_PROBLEMS = {
    "chain_sum": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}},
    "products": {"config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}},
}


@dataclass(frozen=True)
class Have:
    """What somebody has, and wants."""

    name: str
    """Of the recipe."""
    goal: Goal
    base: str | None = None
    """Where the weights come from; None for a model from nothing."""
    data: str | None = None
    """A path or hub name; None takes built-in problems."""
    gpu: bool = False
    """Settings for a GPU; else for two CPU cores, where a run takes minutes to an hour."""


def name_for(stem: str) -> str:
    """A recipe's name made of a file's, which may hold what a name may not."""
    kept = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]
    return kept or "my-recipe"


def draft(have: Have) -> str:
    """The recipe as YAML with comments; `load` reads it."""
    return "\n".join(_lines(have)) + "\n"


def _lines(have: Have) -> Iterator[str]:
    yield SCHEMA_LINE
    yield f"# To {_GOAL[have.goal]}. A first draft: the comments say what to change."
    yield "# What it will take: farthing plan FILE. Every key with its default: farthing run FILE --dry-run."
    yield f"name: {dump_value(have.name)}"
    if have.base is not None:
        yield from _key("base", dump_value(have.base), "or a folder, .gguf, hf:owner/name, pypi:name", 0)
    yield "stages:"
    if have.goal == "scratch":
        yield from _pretrain(have)
    if have.goal in ("chat", "both"):
        yield from _sft(have)
    if have.goal in ("reason", "both"):
        yield from _grpo(have)
        yield "evaluate: {tasks: same, held_out: 200} # questions kept out of training, asked before and after"


_GOAL: dict[Goal, str] = {
    "chat": "answer as the conversations do",
    "reason": "get more questions right",
    "both": "learn from worked answers, then get more questions right",
    "scratch": "make a new model from text",
}


def _pretrain(have: Have) -> Iterator[str]:
    yield "  - kind: pretrain"
    yield from _key(
        "data", f"[{dump_value(have.data)}]", "documents: .jsonl, .parquet, .txt, a folder, hf:owner/name"
    )
    yield from _key(
        "size", "100M" if have.gpu else "2M", "parameters; sets width, depth and rates (docs/training.md)"
    )
    yield from _key("tokens", "2B" if have.gpu else "4M", "left out: 20 for each parameter")
    yield from _key("vocab_size", "32768" if have.gpu else "4096", "of the tokenizer trained on the data")
    yield from _key("length", "1024" if have.gpu else "256", "tokens in a row")
    if have.gpu:
        yield from _key("memory_gb", "24", "for activations, beside the weights")


def _sft(have: Have) -> Iterator[str]:
    yield "  - kind: sft"
    if have.goal == "both":
        yield "    data:"
        yield f"      - tasks: {dump_value({_task_name(have): {'path': have.data}})}"
        yield "        items: 2000 # worked answers to learn from"
    else:
        yield from _key(
            "data", f"[{dump_value(have.data)}]", "farthing data FILE shows what is learnt from it"
        )
    yield from _key("length", "4096" if have.gpu else "512", "tokens; longer conversations are left out")
    yield from _key("batch_tokens", "65536" if have.gpu else "4096", "tokens a step")
    yield from _key("epochs", "2", "passes over the data")
    yield from _key("lr", "1e-5" if have.gpu else "5e-5", "smaller for larger models")
    if have.gpu:
        yield from _key("memory_gb", "24", "for activations, beside the weights")


def _grpo(have: Have) -> Iterator[str]:
    yield "  - kind: grpo"
    if have.data is None:
        yield "    tasks: # built-in problems; docs/recipes.md lists them, and how to take your own"
        yield from (f"      {name}: {dump_value(task)}" for name, task in _PROBLEMS.items())
    else:
        yield f"    tasks: {dump_value({_task_name(have): {'path': have.data}})}"
    yield from _key("answer", "final", "where the answer stands: final, tag (<answer>…</answer>) or boxed")
    yield from _key("prompts", "32" if have.gpu else "16", "questions a step")
    yield from _key("group", "16" if have.gpu else "8", "answers to each, compared with each other")
    yield from _key("steps", "200" if have.gpu else "24")
    yield from _key(
        "max_new_tokens", "1024" if have.gpu else "128", "longest answer; what is cut off earns nothing"
    )
    yield from _key("lr", "1e-6" if have.gpu else "2e-5", "smaller for larger models")
    if have.gpu:
        yield from _key("memory_gb", "24", "for activations, beside the weights")


def _task_name(have: Have) -> str:
    stem = re.split(r"[/\\]", have.data or "")[-1].partition(".")[0].partition(":")[0]
    return re.sub(r"\W+", "_", stem).strip("_") or "mine"


def _key(key: str, value: str, comment: str = "", indent: int = 4) -> Iterator[str]:
    yield f"{' ' * indent}{key}: {value}" + (f" # {comment}" if comment else "")
