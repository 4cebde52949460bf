"""How much of a device's peak a training run reaches: one function, fitted on published runs.

The share of the 16-bit peak that a whole run reaches (model FLOPs, causal attention once, over peak x
device-hours, so that interruptions count) is taken to be

    e = E * (B / 200)^b * (c / 100 GFLOP)^(w (1 - near)) * (s / 4096)^q
        times fp8, moe, old, steady, distilled where they hold

    B     machine balance: peak FLOP/s over bytes a second of memory, as norms and activations wait for memory
    c     training FLOPs of a token, the size of the network
    near  min(1, 8 / devices), the share of a group of peers that is in the same node: a small network spread
          over many nodes waits for them, one in a single node or a large one does not
    s     tokens of a sequence, taken as 1024 to 8192 at least and at most, where the runs are
    fp8   products in FP8;  moe  mixture of experts;  old  published before 2023, when training stacks took
          up fused attention (arXiv:2205.14135) and no longer computed every layer twice
    steady, distilled   a speed without interruptions; a pruned model that learnt from the logits of larger
          ones (`published_runs`): never set when planning

The logarithms are fitted to `published_runs.csv` by maximum a posteriori: normal priors on the coefficients
(below), Student-t noise with 4 degrees of freedom, so that a few odd rows do not decide. Nothing about a run's
own speed goes in, nor who made it: a plan is for somebody who is not in the table. So the range is that of runs
of a laboratory of which the fit has seen none: conformal quantiles of the errors when whole laboratories are
left out, so wide that 9 of 10 runs should fall in. docs/planning.md has the figures, what else was tried, and
what the model cannot know.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farthing.base.errors import UserError
from farthing.base.figures import percent, short
from farthing.cost.devices import Device, peak
from farthing.cost.flops import Flops
from farthing.cost.shapes import shapes
from farthing.plans.published import BASELINE, PublishedRun, published_runs

NODE = 8  # devices of a node
UNFUSED_BEFORE = 2023
HIGHEST = 0.65  # no run of the table is above 0.61; what the formula gives beyond is extrapolation
LENGTHS = (
    1024,
    8192,
)  # tokens of a sequence in the table; Llama 405B loses 5% from 8K to 128K, not what q says
OUTSIDE = 0.05  # of the runs, on either side of the range
_BALANCE, _WORK, _LENGTH = 200.0, 100e9, 4096.0  # where the factors are 1
_FREEDOM = 4.0
_ROUNDED = 2.0  # times the noise of tested rows: that of rounded hours, and of speeds that share a program

# The mean and deviation of each coefficient before the data. FP8: torchtitan's tokens a second with it over
# those without. Old: computing the forward pass twice makes 4 passes of 3. Steady: runs of which speed and hours
# are both published kept 0.66 to 1 of their speed, 0.88 in the median (DeepSeek-V3, Llama 405B, SmolLM3, GLM-130B,
# PaLM).
PRIORS: dict[str, tuple[float, float]] = {
    "constant": (math.log(0.4), 0.5),
    "balance": (0.0, 0.5),
    "work": (0.0, 0.2),
    "length": (0.0, 0.1),
    "fp8": (math.log(1.28), 0.05),
    "moe": (0.0, 0.3),
    "old": (math.log(3 / 4), 0.15),
    "steady": (-math.log(0.88), 0.1),
    "distilled": (0.0, 0.8),
}
_SCOPES = ("steady", "distilled")


@dataclass(frozen=True)
class Conditions:
    """Predictors of a run's efficiency; all are known before it starts."""

    work: float
    """Training FLOPs of a token."""
    seq_len: int
    balance: float
    """Peak FLOP/s over bytes a second."""
    devices: int
    fp8: bool = False
    moe: bool = False
    year: int = UNFUSED_BEFORE
    scope: str = "run"

    def features(self) -> NDArray[np.float64]:
        """In the order of `PRIORS`."""
        shortest, longest = LENGTHS
        return np.array(
            [
                1.0,
                math.log(self.balance / _BALANCE),
                math.log(self.work / _WORK) * (1 - min(1.0, NODE / self.devices)),
                math.log(min(max(self.seq_len, shortest), longest) / _LENGTH),
                self.fp8,
                self.moe,
                self.year < UNFUSED_BEFORE,
                *(self.scope == scope for scope in _SCOPES),
            ]
        )


@dataclass(frozen=True)
class Efficiency:
    """Share of the 16-bit peak over a whole run. `low` and `high` are efficiencies: low means more hours."""

    low: float
    likely: float
    high: float


@dataclass(frozen=True)
class Validated:
    """A published run beside what models that never saw it predict, as one clean run; hours are device-hours."""

    run: PublishedRun
    predicted: float
    low: float
    high: float
    unseen: float
    """Predicted by a fit without any run of its laboratory."""
    baseline: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.run.device_hours

    @property
    def in_range(self) -> bool:
        return self.low <= self.run.device_hours <= self.high


def conditions(
    config: Mapping[str, Any],
    per_token: Flops,
    device: Device,
    devices: int,
    *,
    seq_len: int,
    precision: str = "bf16",
) -> Conditions:
    """The conditions of a run that is planned. Raises UserError for a device without a known bandwidth."""
    return Conditions(
        work=per_token.model,
        seq_len=seq_len,
        balance=balance(device),
        devices=devices,
        fp8=precision == "fp8",
        moe=any(layer.sparse for layer in shapes(config).layers),
    )


def balance(device: Device) -> float:
    """FLOPs that the device computes while it reads one byte. Raises UserError if its speed is not known."""
    if not device.bytes_per_second or not peak(device):
        raise UserError(f"no speed is known for {device.name}: name a device of the catalogue, --gpu h100")
    return peak(device) / device.bytes_per_second


def efficiency(run: Conditions) -> Efficiency:
    """The prediction for a run of the model fitted on all rows."""
    likely = _predict(run, _fit(_all_rows()))
    below, above = spread()
    return Efficiency(likely * math.exp(below), likely, min(1.0, likely * math.exp(above)))


def coefficients() -> dict[str, float]:
    """The fitted coefficients by name, logarithms of factors; see the module's formula."""
    return dict(zip(PRIORS, _fit(_all_rows()).tolist(), strict=True))


@functools.cache
def spread() -> tuple[float, float]:
    """Quantiles of ln(reached / predicted efficiency), each run predicted without its laboratory."""
    return _quantiles(_errors(_laboratory))


@functools.cache
def validation() -> tuple[Validated, ...]:
    """Every test row, predicted by a fit without it; its range is made of the other rows' errors."""
    alone, unseen = _errors(_name), _errors(_laboratory)
    rows = []
    for i, run in enumerate(_tested()):
        reached = run.device_hours
        predicted = reached * math.exp(alone[i])
        below, above = _quantiles(unseen[:i] + unseen[i + 1 :])
        rows.append(
            Validated(
                run=run,
                predicted=predicted,
                low=predicted * math.exp(-above),
                high=predicted * math.exp(-below),
                unseen=reached * math.exp(unseen[i]),
                baseline=run.per_token.model * run.tokens / (peak(run.device) * 3600 * BASELINE),
            )
        )
    return tuple(rows)


def summary(ratios: Iterable[float]) -> dict[str, float]:
    """Predicted over reported hours: median absolute error, shares within a factor of 2 and of 1.6."""
    found = np.array(list(ratios))
    off = np.abs(np.log(found))
    return {
        "runs": len(found),
        "median_error": float(np.median(np.abs(found - 1))),
        "within_2": float(np.mean(off <= math.log(2))),
        "within_1_6": float(np.mean(off <= math.log(1.6))),
        "log_deviation": float(np.std(np.log(found))),
    }


def default_devices(flops: float, device: Device) -> int:
    """Default number of devices: the fewest of 1, 2, 4, … that finish the run in 60 days at the baseline's 40% of
    peak."""
    count = 1
    while flops / (peak(device) * BASELINE * count) > 60 * 24 * 3600 and count < 2**20:
        count *= 2
    return count


# ---- the fit ----


@functools.cache
def _all_rows() -> tuple[PublishedRun, ...]:
    return tuple(run for run in published_runs() if run.use in ("test", "approximate", "steady"))


def _tested() -> list[PublishedRun]:
    return [run for run in _all_rows() if run.use == "test"]


@functools.cache
def _conditions(run: PublishedRun, scope: str | None = None) -> Conditions:
    work = run.per_token.model
    return Conditions(
        work=work,
        seq_len=run.seq_len,
        balance=balance(run.device),
        devices=run.devices or max(NODE, default_devices(work * run.tokens, run.device)),
        fp8=run.precision == "fp8",
        moe=run.moe,
        year=run.year,
        scope=scope or run.scope,
    )


@functools.lru_cache(maxsize=256)
def _fit(rows: tuple[PublishedRun, ...]) -> NDArray[np.float64]:
    """Maximum a posteriori by iteratively reweighted least squares; the noise's scale is fitted along."""
    X = np.stack([_conditions(run).features() for run in rows])
    y = np.array([_reached(run) for run in rows])
    mean, deviation = np.array(list(PRIORS.values())).T
    exact = np.array([1.0 if run.use == "test" else 1 / _ROUNDED**2 for run in rows])
    weights, scale = mean.copy(), 0.3
    for _ in range(60):
        left = y - X @ weights
        trust = exact * (_FREEDOM + 1) / (_FREEDOM + exact * (left / scale) ** 2)
        scale = max(0.08, math.sqrt(float(np.mean(trust * left**2))))
        A = (X * trust[:, None]).T @ X / scale**2 + np.diag(deviation**-2)
        weights = np.linalg.solve(A, (X * trust[:, None]).T @ y / scale**2 + mean / deviation**2)
    return weights


@functools.cache
def _reached(run: PublishedRun) -> float:
    return math.log(run.mfu)


def _predict(run: Conditions, weights: NDArray[np.float64]) -> float:
    return min(HIGHEST, math.exp(float(run.features() @ weights)))


def _name(run: PublishedRun) -> str:
    return run.name


def _laboratory(run: PublishedRun) -> str:
    return run.laboratory


@functools.cache
def _errors(key: Callable[[PublishedRun], str]) -> list[float]:
    """ln(reached / predicted) of every test row under a fit without any row of the same `key`, as one clean run."""
    found = []
    for run in _tested():
        others = tuple(other for other in _all_rows() if key(other) != key(run))
        found.append(_reached(run) - math.log(_predict(_conditions(run, scope="run"), _fit(others))))
    return found


def _quantiles(errors: list[float]) -> tuple[float, float]:
    """Conformal: a further error from where these are from is below the first, or above the second, with a
    probability of `OUTSIDE` at most each."""
    ordered = sorted(errors)
    k = max(1, int(OUTSIDE * (len(ordered) + 1)))
    return ordered[k - 1], ordered[-k]


def validation_json() -> dict[str, Any]:
    """Rows, and summaries of the model, of it without a run's laboratory, and of the baseline."""
    rows = validation()
    below, above = spread()
    return {
        "rows": [
            {
                "run": row.run.name,
                "model": row.run.model,
                "laboratory": row.run.laboratory,
                "scope": row.run.scope,
                "device": row.run.device.name,
                "reported_hours": row.run.device_hours,
                "predicted_hours": row.predicted,
                "low_hours": row.low,
                "high_hours": row.high,
                "ratio": row.ratio,
                "ratio_without_laboratory": row.unseen / row.run.device_hours,
                "in_range": row.in_range,
                "baseline_ratio": row.baseline / row.run.device_hours,
                "flops": row.run.per_token.model * row.run.tokens,
                "reported_flops": row.run.reported_flops or None,
                "source": row.run.source,
                "evidence": row.run.evidence,
                "notes": row.run.notes,
            }
            for row in rows
        ],
        "summary": {
            "model": summary(row.ratio for row in rows),
            "model_on_single_runs": summary(row.ratio for row in rows if row.run.scope == "run"),
            "model_without_laboratory": summary(row.unseen / row.run.device_hours for row in rows),
            "baseline": summary(row.baseline / row.run.device_hours for row in rows),
            "in_range": sum(row.in_range for row in rows) / len(rows),
        },
        "left_out": [
            {"run": run.name, "why": f"{run.use}: {run.notes}"}
            for run in published_runs()
            if run.use in ("implausible", "approximate", "computed")
        ],
        "coefficients": coefficients(),
        "range_of_log_efficiency": [below, above],
    }


def validation_text() -> str:
    """The table as text."""
    found = validation_json()
    lines = [f"{'run':22} {'scope':9} {'reported':>10} {'predicted':>10} {'ratio':>6}  in range"]
    for row in found["rows"]:
        lines.append(
            f"{row['run']:22} {row['scope']:9} {short(row['reported_hours']):>10} "
            f"{short(row['predicted_hours']):>10} {row['ratio']:6.2f}  {'yes' if row['in_range'] else 'no'}"
        )
    lines.append(
        "device-hours; every run is predicted by a fit that never saw it, as one clean run of its size"
    )
    names = {
        "model": "the model",
        "model_on_single_runs": "  of these, single runs",
        "model_without_laboratory": "without its laboratory",
        "baseline": f"baseline: {percent(BASELINE, 0)} of peak",
    }
    for key, name in names.items():
        s = found["summary"][key]
        lines.append(
            f"{name:28} {s['runs']:3} runs: median error {percent(s['median_error'])}, "
            f"{100 * s['within_2']:.0f}% within a factor 2, {100 * s['within_1_6']:.0f}% within 1.6"
        )
    lines.append(f"the low-high range holds {percent(found['summary']['in_range'], 0)} of the runs")
    lines.append(
        "card: all training hours of a model card, which may cover more than one clean pass; distilled: a pruned "
        "model trained on the logits of others"
    )
    lines += [f"not tested on: {row['run']} ({row['why']})" for row in found["left_out"]]
    return "\n".join(lines)
