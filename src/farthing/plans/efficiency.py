"""How much of a device's peak a training run reaches: one function, fitted on published runs.

The share of the 16-bit peak that a whole run reaches (model FLOPs, causal attention once, over peak x
device-hours, so that interruptions count) is taken to be

    e = E * (d / B)^w * exp(n * near) * (1 + a)^s, times fp8, moe, old, card, distilled where they hold

    d     width of the network
    B     machine balance: peak FLOP/s over bytes a second of memory; small networks on fast devices wait for
          memory, since norms and activations move d bytes where products compute d^2
    near  min(1, 8 / devices), the share of a group of peers that is in the same node
    a     attention's share of the model FLOPs; it runs slower than plain products, and many kernels compute
          the masked half too
    fp8   products in FP8;  moe  mixture of experts;  old  published before 2023, when training stacks took
          up fused attention (arXiv:2205.14135) and no longer computed every layer twice
    card, distilled   the hours cover more than one clean run (`runs_table`); never set when planning

The logarithms are fitted to `published_runs.csv` by maximum a posteriori: normal priors on the coefficients
(below), Student-t noise with 4 degrees of freedom, so that a few odd rows do not decide. Nothing about a
run's own speed goes in. The low-high range spans the 5% and 95% quantiles of the leave-one-out errors.
docs/planning.md has the table, what else was tried, and what the model cannot know.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
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
QUANTILES = (0.05, 0.95)
_FREEDOM = 4.0
_ROUNDED = 2.0  # times the noise of the other rows: that of rows whose hours or FLOPs are only approximate

# The mean and deviation of each coefficient before the data. FP8: tokens a second of torchtitan's FP8 runs
# over its BF16 runs, the steady rows of published_runs.csv. Old: computing the forward pass twice makes 4
# passes of 3. Attention: half of the pairs are masked, and computing them as well doubles its time.
PRIORS: dict[str, tuple[float, float]] = {
    "constant": (math.log(0.45), 0.5),
    "width over balance": (0.0, 0.3),
    "near": (0.0, 0.3),
    "attention": (-1.0, 1.0),
    "fp8": (math.log(1.28), 0.02),
    "moe": (0.0, 0.3),
    "old": (math.log(3 / 4), 0.15),
    "card": (0.0, 0.4),
    "distilled": (0.0, 0.8),
}
_SCOPES = ("card", "distilled")


@dataclass(frozen=True)
class Conditions:
    """Predictors of a run's efficiency; all are known before it starts."""

    width: float
    attention: float
    """Share of the model FLOPs, causal."""
    balance: float
    """Peak FLOP/s over bytes a second."""
    devices: int
    fp8: bool = False
    moe: bool = False
    year: int = UNFUSED_BEFORE
    scope: str = "run"

    def features(self) -> NDArray[np.float64]:
        """In the order of `PRIORS`."""
        return np.array(
            [
                1.0,
                math.log(self.width / self.balance),
                min(1.0, NODE / self.devices),
                math.log1p(self.attention),
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
    """A published run beside what a model that never saw it predicts; hours are device-hours."""

    run: PublishedRun
    predicted: float
    low: float
    high: float
    baseline: float
    labelled: float
    """Predicted given the row's scope."""

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
    precision: str = "bf16",
    year: int = UNFUSED_BEFORE,
) -> Conditions:
    """The conditions of a run that is planned. Raises UserError for a device without a known bandwidth."""
    s = shapes(config)
    return Conditions(
        width=s.width,
        attention=per_token.attention_causal / per_token.model,
        balance=balance(device),
        devices=devices,
        fp8=precision == "fp8",
        moe=any(layer.sparse for layer in s.layers),
        year=year,
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
    """Quantiles of ln(reached / predicted efficiency) over the leave-one-out tests, without scopes."""
    return _quantiles(_errors())


@functools.cache
def validation() -> tuple[Validated, ...]:
    """Every test row, predicted by a fit without it; its range is made of the other rows' errors."""
    errors, rows = _errors(), []
    tested = [run for run in _all_rows() if run.use == "test"]
    for i, run in enumerate(tested):
        below, above = _quantiles(errors[:i] + errors[i + 1 :])
        weights = _fit(tuple(other for other in _all_rows() if other is not run))
        labelled = _conditions(run)
        blind = _predict(_conditions(run, scope="run"), weights)
        hours = run.per_token.model * run.tokens / (peak(run.device) * 3600)
        rows.append(
            Validated(
                run=run,
                predicted=hours / blind,
                low=hours / (blind * math.exp(above)),
                high=hours / (blind * math.exp(below)),
                baseline=hours / BASELINE,
                labelled=hours / _predict(labelled, weights),
            )
        )
    return tuple(rows)


def without_families() -> list[float]:
    """Predicted over reported hours of every test row under a fit without any run of its family (the letters
    its name begins with) and without scopes: the model's error on a stack it has never seen."""
    found = []
    for run in _all_rows():
        if run.use == "test":
            others = tuple(other for other in _all_rows() if _family(other) != _family(run))
            blind = _predict(_conditions(run, scope="run"), _fit(others))
            found.append(math.exp(_reached(run)) / blind)
    return found


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
    return tuple(run for run in published_runs() if run.use in ("test", "approximate"))


@functools.cache
def _conditions(run: PublishedRun, scope: str | None = None) -> Conditions:
    per_token = run.per_token
    return Conditions(
        width=run.width,
        attention=per_token.attention_causal / per_token.model,
        balance=balance(run.device),
        devices=run.devices or max(NODE, default_devices(per_token.model * run.tokens, run.device)),
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


def _family(run: PublishedRun) -> str:
    return "".join(itertools.takewhile(str.isalpha, run.name))


@functools.cache
def _reached(run: PublishedRun) -> float:
    return math.log(run.mfu)


def _predict(run: Conditions, weights: NDArray[np.float64]) -> float:
    return min(HIGHEST, math.exp(float(run.features() @ weights)))


@functools.cache
def _errors() -> list[float]:
    """ln(reached / predicted) of every test row under a fit without it, and without its scope."""
    return [
        _reached(run)
        - math.log(
            _predict(_conditions(run, scope="run"), _fit(tuple(o for o in _all_rows() if o is not run)))
        )
        for run in _all_rows()
        if run.use == "test"
    ]


def _quantiles(errors: list[float]) -> tuple[float, float]:
    low, high = np.quantile(errors, QUANTILES)
    return float(low), float(high)


def validation_json() -> dict[str, Any]:
    """Rows, and summaries of the model without scopes, with scopes, and of the baseline."""
    rows = validation()
    below, above = spread()
    return {
        "rows": [
            {
                "run": row.run.name,
                "model": row.run.model,
                "scope": row.run.scope,
                "device": row.run.device.name,
                "reported_hours": row.run.device_hours,
                "predicted_hours": row.predicted,
                "low_hours": row.low,
                "high_hours": row.high,
                "ratio": row.ratio,
                "in_range": row.in_range,
                "baseline_ratio": row.baseline / row.run.device_hours,
                "ratio_told_scope": row.labelled / row.run.device_hours,
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
            "model_told_scopes": summary(row.labelled / row.run.device_hours for row in rows),
            "model_without_family": summary(without_families()),
            "baseline": summary(row.baseline / row.run.device_hours for row in rows),
            "in_range": sum(row.in_range for row in rows) / len(rows),
        },
        "left_out": [
            {"run": run.name, "why": f"{run.use}: {run.notes}"}
            for run in published_runs()
            if run.use in ("implausible", "approximate")
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
        "model_told_scopes": "the model, given the scopes",
        "model_without_family": "fitted without its family",
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
        "card: the hours of a model card, which cover more than one clean pass; distilled: a pruned model "
        "trained on the logits of others"
    )
    lines += [f"not tested on: {row['run']} ({row['why']})" for row in found["left_out"]]
    return "\n".join(lines)
