"""Learning curves of runs that share a validation set, compared at equal FLOPs, seconds, dollars and tokens.

Runs of one recipe that differ only in their seed are one variant. Every curve is read at the largest amount that all
runs reached, by a straight line between its two nearest validations. Differences to the baseline are taken seed by
seed, since runs of a seed read the same text in the same order. Intervals are Student's, at 95%, over the seeds; they
say nothing about other text.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.schema import parse_text
from farthing.cost.spend import Booked
from farthing.report.run import Json, Run, mapping, number, read_json, text

AXES = ("flops", "seconds", "dollars", "tokens")
DISTURBED = 0.9  # share of the cores that another run had, below which a run was disturbed
_GRID = 200
_FLAT = 1e-6  # amounts closer than this share of each other are one
_NAMED, _LONGEST = 3, 60  # settings that a variant may be named by, and characters of the name

Curve = Mapping[str, Sequence[float]]  # by axis, and "bits"; one entry a validation


@dataclass(frozen=True)
class Trained:
    """One run: how well it predicted the validation set as training went on."""

    name: str
    recipe: str
    """Name of its recipe."""
    seed: int
    settings: Mapping[str, str]
    """Its recipe but for name and seed, by dotted key; equal in runs of one variant."""
    validation: str
    """SHA-256 of the validation text."""
    curve: Curve
    parameters: int | None
    active: int | None
    tokens_per_second: float
    cores: float | None
    """Cores the training had, on average."""


def read(run: Run, booked: Booked | None) -> Trained | None:
    """The learning curve of a run and its ledger: of its first stage that validated. None if there is none.

    Only the seconds of training count, without validations and checkpoints; dollars are those seconds at the rate of
    the run's own ledger.
    """
    for stage, lines in run.metrics.items():
        done = read_json(run.folder / "stages" / stage / "done.json")
        validation = text(mapping(mapping(done.get("data")).get("validation")).get("sha256"))
        paid = [line for line in booked.lines if line["stage"] == stage] if booked else []
        paid = [line for line in paid if line["activity"] == "train" and line["seconds"] > 0]
        if not validation or not paid:
            continue
        rate = sum(line["usd"] for line in paid) / sum(line["seconds"] for line in paid)
        curve, cores = _curve(lines, rate)
        if len(curve["bits"]) < 2:
            continue
        return Trained(
            name=text(str(run.folder)),
            recipe=text(run.recipe.get("name")),
            seed=int(number(run.recipe.get("seed")) or 0),
            settings=_settings(run),
            validation=validation,
            curve=curve,
            parameters=_whole(done.get("parameters")),
            active=_whole(done.get("active")),
            tokens_per_second=curve["tokens"][-1] / curve["seconds"][-1],
            cores=cores,
        )
    return None


def same(one: Trained, other: Trained) -> bool:
    """Whether two runs are of one recipe, seed and validation set."""
    return (one.settings, one.seed, one.validation) == (other.settings, other.seed, other.validation)


def _settings(run: Run) -> dict[str, str]:
    """The leaves of a run's recipe but for its name and seed, by dotted key; lists count from 1."""
    leaves: dict[str, str] = {}

    def descend(value: object, path: tuple[str, ...]) -> None:
        if isinstance(value, dict | list) and value:
            for key, child in value.items() if isinstance(value, dict) else enumerate(value, 1):
                descend(child, (*path, str(key)))
        else:
            leaves[text(".".join(path))] = text(value)

    try:  # refuses aliases, by which a short file can say a very long or an endless one
        recipe = mapping(parse_text(run.recipe_text if run.recipe else "", "recipe.yaml"))
        descend({key: value for key, value in recipe.items() if key not in ("name", "seed")}, ())
    except (UserError, RecursionError):
        return {"": run.recipe_text}
    return leaves


def _whole(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _curve(lines: Sequence[Json], rate: float) -> tuple[dict[str, list[float]], float | None]:
    """The curve over the validations, and the cores that training had."""
    curve: dict[str, list[float]] = {name: [] for name in (*AXES, "bits")}
    flops = seconds = cores = 0.0
    for line in lines:
        spent = max(0.0, number(mapping(line.get("seconds_by_activity")).get("train")) or 0.0)
        flops, seconds = flops + max(0.0, number(line.get("flops")) or 0.0), seconds + spent
        cores += spent * max(0.0, number(line.get("cores_had")) or 0.0)
        bits, tokens = number(line.get("val_bits_per_byte")), number(line.get("tokens"))
        if bits is not None and tokens is not None and min(tokens, seconds, flops) > 0:
            for name, value in zip(curve, (flops, seconds, seconds * rate, tokens, bits), strict=True):
                curve[name].append(value)
    return curve, cores / seconds if cores else None


def compare(runs: Sequence[Trained], baseline: str | None = None) -> Json | None:
    """Compare runs that share a validation set, each seed of a variant once; None for fewer than two variants.

    Args:
        baseline: the variant that the others are compared with; the first run's if None.

    Raises:
        UserError: for a baseline that is none of the variants.
    """
    variants = _variants(runs)
    if len(variants) < 2:
        return None
    if baseline is not None and baseline not in variants:
        raise UserError(f"--baseline {baseline}: no such variant; there are {', '.join(variants)}")
    first = baseline or next(iter(variants))
    most = max((run.cores for run in runs if run.cores), default=None)
    equal = {axis: _at_equal(axis, variants, first) for axis in AXES}
    return {
        "validation": runs[0].validation,
        "baseline": first,
        "variants": [_described(name, members, most) for name, members in variants.items()],
        "equal": {axis: found for axis, found in equal.items() if found is not None},
    }


def _variants(runs: Sequence[Trained]) -> dict[str, list[Trained]]:
    """The runs by variant, in the order given, those of a variant by seed."""
    by_settings: dict[tuple[tuple[str, str], ...], list[Trained]] = {}
    for run in runs:
        by_settings.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    groups = [sorted(members, key=lambda run: run.seed) for members in by_settings.values()]
    stems = [_stem(members) for members in groups]
    names, shared = list(stems), Counter(stems)
    for place, name in enumerate(stems):
        if shared[name] > 1 or not name:  # one recipe changed by --set
            alike = [group[0].settings for group, other in zip(groups, stems, strict=True) if other == name]
            names[place] = _by_settings(name, groups[place][0].settings, alike) or _folder(groups[place][0])
    if len(set(names)) < len(names):
        names = [members[0].name for members in groups]
    return dict(zip(names, groups, strict=True))


def _by_settings(name: str, mine: Mapping[str, str], alike: Sequence[Mapping[str, str]]) -> str:
    """A variant's name with the settings that tell it from others of the name; empty if they are too many."""
    keys = {key for settings in alike for key in settings}
    keys = {key for key in keys if len({settings.get(key) for settings in alike}) > 1}
    if len(keys) > _NAMED:
        return ""
    said = [re.sub(r"^stages\.\d+\.", "", key) + f"={mine.get(key) or 'none'}" for key in sorted(keys)]
    long = " ".join([name, *said] if name else said)
    return long if len(long) <= _LONGEST else ""


def _folder(run: Trained) -> str:
    return Path(run.name).name


def _stem(runs: Sequence[Trained]) -> str:
    """The name of the runs' recipes, without the number at its end where they differ only in that."""
    names = {run.recipe for run in runs}
    stems = {re.sub(r"-\d+$", "", name) for name in names}
    return names.pop() if len(names) == 1 else stems.pop() if len(stems) == 1 else ""


def _described(name: str, runs: Sequence[Trained], most: float | None) -> Json:
    speeds = [run.tokens_per_second for run in runs]
    return {
        "name": name,
        "parameters": runs[0].parameters,
        "active": runs[0].active,
        "flops_per_token": runs[0].curve["flops"][-1] / runs[0].curve["tokens"][-1],
        "tokens_per_second": statistics.fmean(speeds),
        "tokens_per_second_ci95": interval(speeds),
        "runs": [
            {
                "name": _folder(run),
                "seed": run.seed,
                "bits_per_byte": run.curve["bits"][-1],
                "tokens_per_second": run.tokens_per_second,
                "cores": run.cores,
                "disturbed": bool(most and run.cores and run.cores < DISTURBED * most),
            }
            for run in runs
        ],
    }


def _at_equal(axis: str, variants: Mapping[str, Sequence[Trained]], baseline: str) -> Json | None:
    """Every variant at the largest amount that all runs reached, and the mean curves up to it; None if the runs have no
    amount in common."""
    curves = {name: [run.curve for run in runs] for name, runs in variants.items()}
    every = [curve for members in curves.values() for curve in members]
    last = min(curve[axis][-1] for curve in every)
    first = max(last / 10, *(curve[axis][0] for curve in every))
    if not 0 < first < last * (1 - _FLAT):
        return None
    grid = [first + (last - first) * k / _GRID for k in range(_GRID)] + [last]
    means = {
        name: [statistics.fmean(bits_at(curve, axis, x) for curve in members) for x in grid]
        for name, members in curves.items()
    }
    ends = {
        name: {run.seed: bits_at(run.curve, axis, last) for run in runs} for name, runs in variants.items()
    }
    rows = []
    for name, by_seed in ends.items():
        values = list(by_seed.values())
        row: Json = {
            "name": name,
            "values": values,
            "mean": statistics.fmean(values),
            "ci95": interval(values),
        }
        if name != baseline:
            row |= _against(by_seed, ends[baseline])
            row["cost_ratio"] = _cost_ratio(grid, means[name], means[baseline])
            row["crossings"] = _crossings(grid, means[name], means[baseline])
        rows.append(row)
    return {"amount": last, "rows": rows, "curves": {"x": grid, "bits": means}}


def _against(mine: Mapping[int, float], theirs: Mapping[int, float]) -> Json:
    """The difference to the baseline over the seeds that both have; clear if its interval leaves out zero."""
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if not differences:  # no seed in common: the means alone
        difference = statistics.fmean(mine.values()) - statistics.fmean(theirs.values())
        return {"difference": difference, "difference_ci95": None, "pairs": 0, "verdict": "unpaired"}
    bounds = interval(differences)
    verdict = "one seed"
    if bounds:
        verdict = "better" if bounds[1] < 0 else "worse" if bounds[0] > 0 else "unclear"
    return {
        "difference": statistics.fmean(differences),
        "difference_ci95": bounds,
        "pairs": len(differences),
        "verdict": verdict,
    }


def bits_at(curve: Curve, axis: str, amount: float) -> float:
    """Bits per byte at an amount within the curve, on a straight line between its neighbours."""
    xs, ys = curve[axis], curve["bits"]
    assert xs[0] <= amount <= xs[-1], "a curve is not extended beyond its ends"
    after = next(place for place, x in enumerate(xs) if x >= amount)
    if after == 0:
        return ys[0]
    share = (amount - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = student(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def student(freedom: int) -> float:
    """The 97.5% point of Student's t, by bisection of its distribution for whole degrees of freedom (Abramowitz and
    Stegun, 26.7.3 and 26.7.4)."""

    def inside(t: float) -> float:  # the probability of |T| < t
        angle = math.atan(t / math.sqrt(freedom))
        term = total = math.cos(angle) if freedom % 2 else 1.0
        for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        if freedom % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * (total if freedom > 1 else 0.0))

    low, high = 0.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return low


def _cost_ratio(grid: Sequence[float], mine: Sequence[float], theirs: Sequence[float]) -> float:
    """Amount needed over the baseline's amount, to reach the worse of both end points on the mean curves. Below 1 is
    cheaper; the ratio is no lower than where the grid begins."""
    better, worse = (mine, theirs) if mine[-1] < theirs[-1] else (theirs, mine)
    level = worse[-1]
    above = [place for place, bits in enumerate(better) if bits > level]
    reached = grid[0]
    if above and above[-1] + 1 < len(grid):  # from there on it stays below
        place = above[-1]
        share = (better[place] - level) / (better[place] - better[place + 1])
        reached += (place + share) * (grid[-1] - grid[0]) / _GRID
    elif above:
        reached = grid[-1]
    return reached / grid[-1] if better is mine else grid[-1] / reached


def _crossings(grid: Sequence[float], mine: Sequence[float], theirs: Sequence[float]) -> list[dict[str, Any]]:
    """Where the mean curves change places: the amount, and whether the variant is ahead from there on."""
    found, ahead = [], None
    for x, one, other in zip(grid, mine, theirs, strict=True):
        if one == other:
            continue
        now = one < other
        if ahead is not None and now != ahead:
            found.append({"amount": x, "ahead_after": now})
        ahead = now
    return found
