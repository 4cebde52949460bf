"""The plan of a recipe, and the plan beside the run that followed it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import Range, bytes_, duration, hourly, letters, money, percent, plural, range_text
from farthing.cost import devices
from farthing.cost.devices import Device
from farthing.cost.flops import parameters
from farthing.cost.memory import WIDTH, Layout, precision_of
from farthing.cost.shapes import shapes
from farthing.plans.measured import Calibration
from farthing.plans.sampling import (
    ALONE,
    Sharing,
    StagePlan,
    halved_and_doubled,
    plan_stages,
    published_guess,
)
from farthing.plans.speed import HOST, LAUNCH, LAUNCHES, READ, Catalogued, Measured, Speed
from farthing.plans.training import Assumption, check_count
from farthing.recipe import Recipe
from farthing.recipe.work import Config, Guess
from farthing.tasks.data import models_asked

ACTIVITIES = ("load", "generate", "verify", "judge", "train", "checkpoint", "evaluate")


@dataclass(frozen=True)
class RecipePlan:
    """A recipe planned on one device, or on several that share its work."""

    recipe: Recipe
    device: Device
    dtype: str
    """Dtype of its products: `bfloat16` or `float32`."""
    config: Config
    sharing: Sharing
    price: float
    price_source: str
    stages: tuple[StagePlan, ...]
    """A device's share of each."""
    low: Mapping[str, float]
    """Seconds by activity if answers are half as long and half as many groups train."""
    high: Mapping[str, float]
    uncertainty: float
    assumptions: tuple[Assumption, ...]

    @property
    def likely(self) -> dict[str, float]:
        return _sum(self.stages)

    def by_activity(self) -> dict[str, Range]:
        """Seconds."""
        u = self.uncertainty
        return {
            name: Range(self.low.get(name, 0) / u, value, self.high.get(name, 0) * u)
            for name, value in self.likely.items()
        }

    @property
    def wall_seconds(self) -> Range:
        return Range(*(sum(column) for column in zip(*self.by_activity().values(), strict=True)))

    @property
    def count(self) -> int:
        return self.sharing.devices

    @property
    def device_hours(self) -> Range:
        return self.wall_seconds.times(self.count / 3600)

    @property
    def usd(self) -> Range:
        return self.device_hours.times(self.price)

    @property
    def energy_kwh(self) -> Range:
        return self.device_hours.times(self.device.watts / 1000)

    @property
    def memory_bytes(self) -> int:
        return max(stage.memory.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= self.device.memory_bytes

    @property
    def limited_by(self) -> str:
        seconds = self.likely
        return "generation" if seconds["generate"] + seconds["evaluate"] > seconds["train"] else "compute"

    def as_json(self) -> dict[str, Any]:
        counted, flops = parameters(self.config), sum(stage.flops for stage in self.stages)
        layout = self.sharing.layout
        return {
            "name": self.recipe.name,
            "device": self.device.name,
            "dtype": self.dtype,
            "count": self.count,
            "flops": flops,
            "params_total": counted.total,
            "params_active": counted.active,
            "wall_seconds": self.wall_seconds.as_json(),
            "wall_hours": self.wall_seconds.times(1 / 3600).as_json(),
            "device_hours": self.device_hours.as_json(),
            "usd": self.usd.as_json(),
            "usd_per_device_hour": self.price,
            "price_source": self.price_source,
            "energy_kwh": self.energy_kwh.as_json(),
            "memory_bytes_per_device": self.memory_bytes,
            "memory_bytes_of_device": self.device.memory_bytes,
            "fits": self.fits,
            "layout": {
                **{name: getattr(layout, name) for name in ("data", "expert", "tensor", "pipeline", "zero")},
                "recompute": self.sharing.recompute,
                "fused_loss": self.sharing.fused_loss,
            },
            "limited_by": self.limited_by,
            "by_activity": {name: seconds.as_json() for name, seconds in self.by_activity().items()},
            "stages": [
                {
                    "name": stage.name,
                    "seconds": dict(stage.seconds),
                    "flops": stage.flops,
                    "tokens": stage.tokens,
                    "memory": stage.memory.parts(),
                }
                for stage in self.stages
            ],
            "assumptions": [asdict(assumption) for assumption in self.assumptions],
        }  # fmt: skip


def plan_recipe(
    recipe: Recipe,
    base: Config | None,
    device: Device,
    calibration: Calibration | None = None,
    *,
    dtype: str | None = None,
    price: float | None = None,
    pass_rate: float | None = None,
    asked: Sequence[Config] = (),
    count: int = 1,
    answer_length: float | None = None,
    kept: float | None = None,
) -> RecipePlan:
    """Plan a recipe on one device, or several; with a calibration on the machine that was measured.

    Several devices work on different data, in the first of these ways that fits: the optimizer's states sharded,
    everything sharded, routed experts split besides; and of each, all activations kept, layers computed again, and the
    loss in one kernel besides.

    Args:
        base: config.json of the recipe's base; None if it starts from nothing.
        dtype: what it computes in where nothing was measured; None takes the recipe's, or bfloat16. What was measured
            says its own.
        price: dollars a device-hour; None takes the recipe's rates, or the catalogue's price.
        pass_rate: share of its answers that the base gets right, where that is known.
        asked: config.json of each model of this machine that judges answers.
        answer_length: mean tokens of a sampled answer; None takes what runs showed of models of this size.
        kept: share of the groups that have something to learn from; None as above.

    Raises UserError for a plan that cannot work: nothing to learn from, or fewer sequences than devices.
    """
    check_pass_rate(recipe, pass_rate)
    check_count(count)
    speed: Speed = (
        Measured(calibration)
        if calibration
        else Catalogued(device, dtype or ("float32" if recipe.dtype == "float32" else "bfloat16"))
    )
    guess = _guess(base, answer_length, kept)
    for sharing in _ways(base, count):
        stages, config = plan_stages(recipe, base, speed, device, guess, asked, sharing)
        if max(stage.memory.total for stage in stages) <= device.memory_bytes:
            break
    ends = [
        _sum(plan_stages(recipe, base, speed, device, end, asked, sharing)[0])
        for end in halved_and_doubled(guess)
    ]
    if price is not None and not 0 < price < float("inf"):
        raise UserError(f"--price {price:g}: dollars a device-hour must be a number above 0")
    paid, source = (price, "given") if price is not None else devices.rate(device, recipe.rates)
    return RecipePlan(
        recipe=recipe,
        device=device,
        dtype=speed.dtype,
        config=config,
        sharing=sharing,
        price=paid,
        price_source=source,
        stages=stages,
        low=ends[0],
        high=ends[1],
        uncertainty=speed.uncertainty,
        assumptions=tuple(
            _assumptions(recipe, device, calibration, speed.dtype, paid, source, guess, sharing)
        ),
    )


def _guess(base: Config | None, answer_length: float | None, kept: float | None) -> Guess:
    """What is assumed of the answers: what is given, else what runs showed."""
    guess = published_guess(base)
    if answer_length is not None:
        if not 1 <= answer_length < math.inf:
            raise UserError(f"--answer-length {answer_length:g}: must be at least 1")
        guess = replace(guess, length=answer_length, source=f"length given; {guess.source}")
    if kept is not None:
        if not 0 < kept <= 1:
            raise UserError(f"--kept {kept:g}: must be a share above 0, at most 1")
        guess = replace(guess, kept=kept, source=f"share given; {guess.source}")
    return guess


def _ways(base: Config | None, count: int) -> Iterator[Sharing]:
    """Ways to share a recipe's work, the plainest first."""
    if count == 1:
        yield ALONE
        return
    layouts = [Layout(data=count, zero=1), Layout(data=count, zero=3)]
    experts = shapes(base).experts if base else 0
    if experts and (ways := math.gcd(count, experts)) > 1:
        layouts.append(Layout(data=count, zero=3, expert=ways))
    for layout in layouts:
        yield Sharing(layout)
        yield Sharing(layout, "full")
        yield Sharing(layout, "full", fused_loss=True)


def check_pass_rate(recipe: Recipe, pass_rate: float | None) -> None:
    """Raises UserError if a base that never earns a reward is to learn from rewards."""
    if pass_rate is None or recipe.stages[0].asks is None:
        return
    if not 0 <= pass_rate <= 1:
        raise UserError(f"--pass-rate {pass_rate:g}: must be a share between 0 and 1")
    if pass_rate == 0:
        raise UserError(
            f"{recipe.name}: {recipe.base} gets none of the answers right, so no group has anything to learn from; "
            "put an sft stage with worked solutions first, or take easier tasks"
        )


def known_pass_rate(run: Path) -> float | None:
    """Share of right answers before training, from an earlier run's results.json; None without one."""
    try:
        found = json.loads((run / "results.json").read_text())["evaluations"]
        share = next(float(e["accuracy"]) for e in found if e["name"] == "before")
    except (OSError, ValueError, KeyError, TypeError, StopIteration, OverflowError, RecursionError):
        return None
    return share if 0 <= share <= 1 else None


def plan_beside_actual(plan: RecipePlan, seconds: Mapping[str, float], usd: float) -> dict[str, Any]:
    """The entry "plan" of results.json: planned and actual seconds by activity, in all, and dollars.

    `seconds` are the ledger's by activity; activities nobody plans, such as idling, count as 0 planned.
    """
    planned = plan.by_activity()
    nothing = Range(0.0, 0.0, 0.0)
    names = [name for name in ACTIVITIES if planned.get(name, nothing).likely or name in seconds]
    names += [name for name in seconds if name not in ACTIVITIES]
    return {
        "wall_seconds": plan.wall_seconds.as_json(),
        "usd": plan.usd.as_json(),
        "by_activity": {name: planned.get(name, nothing).likely for name in names},
        "actual": {
            "wall_seconds": sum(seconds.values()),
            "usd": usd,
            "by_activity": {name: float(seconds.get(name, 0.0)) for name in names},
        },
        "ratio": plan.wall_seconds.likely / max(1e-9, sum(seconds.values())),
        "assumptions": [asdict(assumption) for assumption in plan.assumptions],
    }


def beside_text(found: Mapping[str, Any]) -> str:
    """`plan_beside_actual` as a few lines of text."""
    actual = found["actual"]
    lines = [f"  {'':12}{'planned':>10}{'actual':>10}"]
    for name, planned in found["by_activity"].items():
        lines.append(f"  {name:12}{duration(planned):>10}{duration(actual['by_activity'][name]):>10}")
    planned, low, high = (found["wall_seconds"][key] for key in ("likely", "low", "high"))
    lines.append(
        f"  {'total':12}{duration(planned):>10}{duration(actual['wall_seconds']):>10}"
        f"   planned {duration(low)} to {duration(high)}"
    )
    return "\n".join(lines)


def recipe_text(plan: RecipePlan) -> str:
    """The plan as text."""
    counted = parameters(plan.config)
    lines = [f"{plan.recipe.name}   {plan.count} x {plan.device.name}, in {plan.dtype}"]
    rows = [("model", f"{letters(counted.total)} parameters, {letters(counted.active)} active")]
    rows += [
        (name, f"{duration(s.likely):>9}   ({duration(s.low)} to {duration(s.high)})")
        for name, s in plan.by_activity().items()
        if s.likely
    ]
    total = plan.wall_seconds
    rows += [
        ("total", f"{duration(total.likely):>9}   ({duration(total.low)} to {duration(total.high)})"),
        ("dollars", range_text(plan.usd, money)),
        ("energy", f"{range_text(plan.energy_kwh)} kWh"),
        (
            "memory",
            f"{bytes_(plan.memory_bytes)} of {bytes_(plan.device.memory_bytes)}"
            + (" a device" if plan.count > 1 else ""),
        ),
        ("limited by", plan.limited_by),
    ]
    lines += [f"  {left:11} {right}" for left, right in rows]
    lines.append("  assumed:")
    lines += [f"    {a.what} ({a.source})" for a in plan.assumptions]
    return "\n".join(lines)


def _assumptions(
    recipe: Recipe,
    device: Device,
    calibration: Calibration | None,
    dtype: str,
    price: float,
    source: str,
    guess: Guess,
    sharing: Sharing,
) -> Iterable[Assumption]:
    if sharing.devices > 1:
        layout = sharing.layout
        how = [f"ZeRO {layout.zero}", f"recompute {sharing.recompute}"]
        how += [f"experts over {layout.expert}"] * (layout.expert > 1) + ["a fused loss"] * sharing.fused_loss
        yield Assumption(
            f"{layout.devices} devices share every step's data evenly ({', '.join(how)}), and wait for "
            "nothing; another trainer has to run it, since Farthing trains on one device",
            "docs/training.md",
        )
    if calibration:
        rate = calibration.gemm_float32 if dtype == "float32" else calibration.gemm_bfloat16
        yield Assumption(
            f"speed as measured on {calibration.date} with {plural(calibration.threads, 'thread')} in "
            f"{duration(calibration.took)}: {rate / 1e9:.3g} GFLOP/s in {dtype}, "
            f"{calibration.bandwidth / 1e9:.1f} GB/s of memory, {calibration.disk / 1e6:.0f} MB/s to disk",
            "farthing calibrate",
        )
        if not calibration.timed:
            yield Assumption(
                "the network itself was not timed: the machine was too slow, or too busy", "assumed"
            )
    else:
        yield Assumption(
            f"computed in {dtype}: weights and activations of {WIDTH[precision_of(dtype)]} bytes, masters of 4",
            "assumed" if recipe.dtype == "auto" else "the recipe",
        )
        yield Assumption(
            f"decoding reads weights and cache at {percent(READ, 0)} of {device.bytes_per_second / 1e9:.0f} GB/s; "
            f"{LAUNCHES} launches of {LAUNCH * 1e6:.0f} microseconds a layer and pass; the host adds "
            f"{percent(HOST, 0)}, as in vLLM 0.5.3; nothing was measured",
            f"assumed; bandwidth: {device.source}; host: vLLM blog of 2024-09-05",
        )
    if any(stage.asks for stage in recipe.stages):
        yield Assumption(
            f"{_answers_text(guess)}, {percent(guess.kept, 0)} of the "
            f"groups have something to learn from, a question is {guess.prompt:.0f} tokens; the range halves and "
            "doubles what is not given",
            guess.source,
        )
    if models_asked(recipe):
        yield Assumption(
            "models that judge answers read each answer of training once; what judges write, and evaluations, are not "
            "in it",
            "scope",
        )
    yield Assumption(f"{hourly(price)} a device", source)
    yield Assumption("downloading, reading texts and interruptions are not in it", "scope")


def _answers_text(guess: Guess) -> str:
    if guess.length is not None:
        return f"answers are {guess.length:,.0f} tokens long"
    return f"answers are {percent(guess.answer, 0)} of the longest allowed"


def _sum(stages: Iterable[StagePlan]) -> dict[str, float]:
    total = dict.fromkeys(ACTIVITIES, 0.0)
    for stage in stages:
        for name, value in stage.seconds.items():
            total[name] += value
    return total
