"""Read a run directory for the report, tolerating everything that is missing, torn or odd.

A run may be in progress, killed or edited by hand: a file that is missing or unreadable counts as empty, a line that
is not a JSON object is skipped, and a value of the wrong type counts as absent. Text loses the characters a page
cannot hold (control characters, lone surrogates); the template escapes it.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import MAX_BYTES, parse_text
from farthing.tasks.item import OUTCOMES

Json = dict[str, Any]
SHOWN = (*OUTCOMES[:4], "other")  # other: the verifier timed out or the gold is bad
LARGEST = 200_000_000  # bytes; a larger file is not ours

MADE_BY = {"pretrain": "pretrained model", "sft": "fine-tuned model"}  # what a kind of stage leaves

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def text(value: object) -> str:
    """Any value as text for a page: characters HTML cannot hold become the replacement character."""
    if value is None:
        return ""
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return _UNPRINTABLE.sub("\ufffd", plain.replace("\r\n", "\n"))


def number(value: object) -> float | None:
    """A number, or None for anything else: a boolean, text, infinity, a magnitude of 1e100 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e100:
        return None
    return float(value) if abs(value) > 1e-100 else 0.0


def pair(value: object) -> tuple[float, float] | None:
    """An interval [low, high] of finite numbers, or None."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def mapping(value: object) -> Json:
    """The value if it is a JSON object, an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[Json]:
    """The JSON objects in a list; an empty list for anything else."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


@dataclass(frozen=True)
class Outcomes:
    """Outcomes of one evaluation (of one task, or of all), and the accuracy's interval."""

    name: str
    counts: dict[str, int]
    """Of answers."""
    ci95: tuple[float, float] | None = None
    samples: int = 1
    """Answers to each question."""
    estimates: tuple[tuple[str, float, tuple[float, float] | None], ...] = ()
    """pass@k and maj@k, where there were several: name, share, interval."""

    @property
    def n(self) -> int:
        """Answers."""
        return sum(self.counts.values())

    @property
    def questions(self) -> int:
        return self.n // self.samples

    @property
    def accuracy(self) -> float:
        return self.counts["right"] / self.n if self.n else 0.0


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: all tasks together, and each of them."""

    overall: Outcomes
    by_task: dict[str, Outcomes] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """The contents of a run directory as plain data."""

    folder: Path
    name: str
    recipe: Json
    recipe_text: str
    facts: Json  # run.json
    results: Json
    lineage: Json
    metrics: dict[str, list[Json]]  # by stage folder, one line a step
    audit: Json
    before: list[Json]  # lines of evaluations/before.jsonl
    after: list[Json]

    @property
    def first(self) -> str:
        """The model that the run's model is compared with: the base or, in a run from nothing, the model that enters
        the last stage with rewards."""
        kinds = [text(stage.get("kind")) for stage in rows(self.recipe.get("stages"))]
        if self.recipe.get("base") is not None or not self.recipe:
            return "base"
        last = max((place for place, pays in enumerate(self._pays) if pays), default=len(kinds))
        return MADE_BY.get(kinds[last - 1], "model before") if 0 < last <= len(kinds) else "model before"

    @property
    def rewarded(self) -> bool:
        """Whether a stage pays rewards, as far as is known."""
        return any(self._pays) or not self.recipe.get("stages")

    @property
    def compared(self) -> bool:
        """Whether the run asks its questions before and after: it has a base, or a stage with rewards."""
        return self.recipe.get("base") is not None or self.rewarded

    @property
    def _pays(self) -> list[bool]:
        return [bool(stage.get("tasks")) for stage in rows(self.recipe.get("stages"))]

    def evaluation(self, name: str) -> Evaluation | None:
        """The evaluation "before" or "after": from results.json, else counted from its lines, else None."""
        for entry in rows(self.results.get("evaluations")):
            overall = _outcomes(entry, "all tasks") if entry.get("name") == name else None
            if overall and overall.n:
                tasks = {text(task): _outcomes(mapping(value), text(task))
                         for task, value in mapping(entry.get("by_task")).items()}  # fmt: skip
                return Evaluation(overall, {task: value for task, value in tasks.items() if value.n})
        lines = self.before if name == "before" else self.after
        if not lines:
            return None
        tasks = {task: _tally([line for line in lines if text(line.get("task")) == task], task)
                 for task in sorted({text(line.get("task")) for line in lines})}  # fmt: skip
        return Evaluation(_tally(lines, "all tasks"), tasks)


def read_run(folder: Path) -> Run:
    """Read everything the report needs from a run directory except its ledger."""
    recipe_text = _read(folder / "recipe.yaml")
    try:
        recipe = mapping(parse_text(recipe_text, "recipe.yaml")) if len(recipe_text) < MAX_BYTES else {}
    except UserError:
        recipe = {}
    results = read_json(folder / "results.json")
    return Run(
        folder=folder,
        name=text(results.get("name") or recipe.get("name") or folder.resolve().name),
        recipe=recipe,
        recipe_text=text(recipe_text),
        facts=read_json(folder / "run.json"),
        results=results,
        lineage=read_json(folder / "lineage.json"),
        metrics={
            text(path.parent.name): lines
            for path in sorted(folder.glob("stages/*/metrics.jsonl"))
            if (lines := _steps(_lines(path)))
        },
        audit=read_json(folder / "audit.json"),
        before=_lines(folder / "evaluations" / "before.jsonl"),
        after=_lines(folder / "evaluations" / "after.jsonl"),
    )


def _read(path: Path) -> str:
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return ""
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _loads(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_json(path: Path) -> Json:
    """The JSON object in a file; empty for anything else."""
    return mapping(_loads(_read(path)))


def _lines(path: Path) -> list[Json]:
    return [
        value for line in _read(path).split("\n") if line.strip() and isinstance(value := _loads(line), dict)
    ]


def _steps(lines: Sequence[Json]) -> list[Json]:
    """Lines ordered by step; when a continued run repeats a step, its last line counts."""
    by_step = {step: line for line in lines if (step := number(line.get("step"))) is not None}
    return [by_step[step] for step in sorted(by_step)]


def _outcomes(entry: Mapping[str, object], name: str) -> Outcomes:
    counts = {outcome: max(0, int(number(entry.get(outcome)) or 0)) for outcome in SHOWN}
    samples = max(1, int(number(entry.get("samples")) or 1))
    counts["other"] = max(counts["other"], int(number(entry.get("n")) or 0) * samples - sum(counts.values()))
    return Outcomes(name, counts, pair(entry.get("ci95")), samples, tuple(_estimates(entry)))


def _estimates(entry: Mapping[str, object]) -> Iterator[tuple[str, float, tuple[float, float] | None]]:
    for kind, said in (("pass_at", "pass@"), ("maj_at", "maj@")):
        for k, value in mapping(entry.get(kind)).items():
            share = number(mapping(value).get("accuracy"))
            if share is not None:
                yield said + text(k), share, pair(mapping(value).get("ci95"))


def outcome(line: Json) -> str:
    """The outcome of one answer, one of SHOWN."""
    found = line.get("outcome")
    return found if isinstance(found, str) and found in SHOWN else "other"


def _tally(lines: Sequence[Json], name: str) -> Outcomes:
    found = Counter(outcome(line) for line in lines)
    samples = 1 + max((int(number(line.get("sample")) or 0) for line in lines), default=0)
    return Outcomes(
        name, {kind: found[kind] for kind in SHOWN}, samples=samples if len(lines) % samples == 0 else 1
    )
