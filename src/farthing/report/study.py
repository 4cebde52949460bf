"""What a study found: variants compared at equal FLOPs, seconds, dollars and tokens, with intervals over seeds.

Reads the folder of a `study` stage and leaves in it study.json (all numbers), study.md (the tables and what they say)
and a drawing for each of two axes. Every training's curve is read at the same amount, the largest that all reached, by
a straight line between its two nearest validations. Differences are taken seed by seed, since runs of a seed read the
same text in the same order. Intervals are Student's, at 95%, over the seeds; they say nothing of other text.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from farthing.recipe.types import Family
from farthing.report.study_curves import drawing
from farthing.report.study_text import Table, findings, headline, markdown, tables

Json = dict[str, Any]
Curve = dict[str, list[float]]  # by axis, and "bits"; one entry a validation

AXES = ("flops", "seconds", "dollars", "tokens")
FAMILIES = get_args(Family)  # in the order of the tables
DRAWN = ("flops", "seconds")
DISTURBED = 0.9  # a run that had less than this of the cores that another of its kind had
_GRID = 200


def write_study(folder: Path, rate: tuple[float, str]) -> str:
    """Write what a finished study found into its folder; gives the name of the run whose model is the best for the
    time it took.

    Args:
        rate: dollars for a device-hour, and where the figure is from.
    """
    runs = [read_run(path.parent, rate[0] / 3600) for path in sorted(folder.glob("runs/*/done.json"))]
    found = compare(runs, rate)
    for axis in DRAWN:
        _write(folder / f"study-{axis}.svg", str(drawing(found, axis)) + "\n")
    _write(folder / "study.md", markdown(found))
    _write(folder / "study.json", json.dumps(found, indent=1) + "\n")
    return str(found["best"])


@dataclass(frozen=True)
class Section:
    """A study on the report's page."""

    headline: str
    findings: list[str]
    tables: list[Table]
    drawings: list[Markup]


def sections(run_dir: Path) -> list[Section]:
    """Every finished study of a run; one whose file is torn or odd is as good as none."""
    found = []
    for path in sorted(run_dir.glob("stages/*/study.json")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
            study = json.loads(path.read_text(encoding="utf-8"))
            drawings = [drawing(study, axis) for axis in DRAWN]
            found.append(Section(headline(study), findings(study), tables(study), drawings))
    return found


def read_run(folder: Path, usd_per_second: float) -> Json:
    """One training: what done.json says, its curve over the validations from the untrained model on, and how fast it
    went.

    Only the seconds of training count, without validations and checkpoints.
    """
    facts: Json = json.loads((folder / "done.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve: Curve = {axis: [0.0] for axis in AXES} | {"bits": [facts["untrained_bits_per_byte"]]}
    flops = seconds = cores = 0.0
    for line in lines:
        spent = line["seconds_by_activity"]["train"]
        flops, seconds, cores = flops + line["flops"], seconds + spent, cores + spent * line["cores_had"]
        if "val_bits_per_byte" in line:
            amounts = (flops, seconds, seconds * usd_per_second, line["tokens"], line["val_bits_per_byte"])
            for name, value in zip(curve, amounts, strict=True):
                curve[name].append(value)
    return facts | {
        "name": folder.name,
        "steps": len(lines),
        "tokens_per_second": lines[-1]["tokens"] / seconds,
        "flops_per_second": flops / seconds,
        "cores_had": round(cores / seconds, 2),
        "curve": curve,
    }


def compare(runs: Sequence[Json], rate: tuple[float, str]) -> Json:
    """Everything study.json holds."""
    runs = sorted(runs, key=lambda run: run["number"])
    kinds: dict[tuple[str, str], list[Json]] = {}
    for run in runs:
        kinds.setdefault((run["family"], run["optimizer"]), []).append(run)
    order = sorted(kinds, key=lambda kind: (kind[1], FAMILIES.index(kind[0])))
    equal = {axis: _at_equal(axis, {kind: kinds[kind] for kind in order}) for axis in AXES}
    best = min(equal["seconds"]["rows"], key=lambda row: row["mean"])
    return {
        "seeds": max(run["number"] for run in runs),
        "reference": order[0][0],
        "usd_per_hour": rate[0],
        "rate_source": rate[1],
        "best": kinds[best["family"], best["optimizer"]][0]["name"],
        "variants": [_variant(kinds[kind]) for kind in order],
        "equal": equal,
    }


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's 95% interval of a mean; None for less than two values."""
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


def at(curve: Mapping[str, Sequence[float]], axis: str, amount: float) -> float:
    """Bits per byte at an amount within the curve, by a straight line between its neighbours."""
    xs, ys = curve[axis], curve["bits"]
    assert xs[0] <= amount <= xs[-1], "no curve is drawn on beyond its ends"
    after = next(place for place, x in enumerate(xs) if x >= amount)
    if after == 0:
        return ys[0]
    share = (amount - xs[after - 1]) / (xs[after] - xs[after - 1])
    return ys[after - 1] + share * (ys[after] - ys[after - 1])


def _variant(runs: Sequence[Json]) -> Json:
    """What is said once of the runs of a family and an optimizer; and each run, disturbed or not."""
    one = runs[0]
    kept = ["family", "optimizer", "parameters", "parameters_mtp", "active", "layers", "width", "steps", "lr"]
    kept += ["batch_tokens", "warmup", "cache_bytes_per_token"]
    most = max(run["cores_had"] for run in runs)
    speeds = [run["tokens_per_second"] for run in runs]
    said = ("name", "seed", "tokens_per_second", "cores_had", "load_average")
    return {
        **{key: one[key] for key in kept},
        "flops_per_token": one["curve"]["flops"][-1] / one["curve"]["tokens"][-1],
        "flops_per_second": statistics.fmean(run["flops_per_second"] for run in runs),
        "tokens_per_second": statistics.fmean(speeds),
        "tokens_per_second_ci95": interval(speeds),
        "runs": [
            {**{key: run[key] for key in said}, "disturbed": run["cores_had"] < DISTURBED * most}
            for run in runs
        ],
    }


def _at_equal(axis: str, kinds: Mapping[tuple[str, str], Sequence[Json]]) -> Json:
    """Every variant at the largest amount that all runs reached, and its mean curve over the last tenfold up to it."""
    curves = {kind: [run["curve"] for run in runs] for kind, runs in kinds.items()}
    last = min(curve[axis][-1] for some in curves.values() for curve in some)
    grid = [last * (0.1 + 0.9 * k / _GRID) for k in range(_GRID)] + [last]
    means = {
        kind: [statistics.fmean(at(curve, axis, x) for curve in some) for x in grid]
        for kind, some in curves.items()
    }
    rows = []
    for kind, some in curves.items():
        values = [at(curve, axis, last) for curve in some]
        row: Json = {
            "family": kind[0],
            "optimizer": kind[1],
            "values": values,
            "mean": statistics.fmean(values),
            "ci95": interval(values),
        }
        reference = next(other for other in curves if other[1] == kind[1])
        if reference != kind:
            theirs = [at(curve, axis, last) for curve in curves[reference]]
            row |= _against(values, theirs)
            row["cost_ratio"] = _cost_ratio(grid, means[kind], means[reference])
            row["crossings"] = _crossings(grid, means[kind], means[reference])
        rows.append(row)
    drawn = [{"family": f, "optimizer": o, "bits": means[f, o]} for f, o in means]
    return {"amount": last, "rows": rows, "curves": {"x": grid, "lines": drawn}}


def _against(values: Sequence[float], reference: Sequence[float]) -> Json:
    """The difference to the reference, seed by seed; clear when its interval leaves out zero."""
    differences = [mine - theirs for mine, theirs in zip(values, reference, strict=True)]
    bounds = interval(differences)
    verdict = "one seed"
    if bounds:
        verdict = "better" if bounds[1] < 0 else "worse" if bounds[0] > 0 else "unclear"
    return {"difference": statistics.fmean(differences), "difference_ci95": bounds, "verdict": verdict}


def _cost_ratio(grid: Sequence[float], mine: Sequence[float], theirs: Sequence[float]) -> float:
    """How much of the amount it takes, over what the reference takes, to come to where both come: to the worse of
    the two ends of the mean curves. Below 1 it is cheaper. What takes less than a tenth counts as a tenth."""
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


def _crossings(grid: Sequence[float], mine: Sequence[float], theirs: Sequence[float]) -> list[Json]:
    """Where the mean curves change places: the amount, and whether the reference is behind from there on."""
    found, ahead = [], None
    for x, one, other in zip(grid, mine, theirs, strict=True):
        if one == other:
            continue
        now = one < other
        if ahead is not None and now != ahead:
            found.append({"amount": x, "ahead_after": now})
        ahead = now
    return found


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
