"""The cost of a training run before it starts: time, devices, money, energy, memory and a layout.

`plan_training` answers for a network trained on so many tokens. FLOPs are exact (`flops`), their speed is the
fitted `efficiency` with its range, memory and layout come from `layout`. Nothing here is one number where only
a range is known: hours, dollars and kWh are low, likely and high.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from farthing.base.errors import UserError
from farthing.base.figures import Range, bytes_, hourly, letters, money, percent, range_text
from farthing.cost import devices
from farthing.cost.devices import Device, peak
from farthing.cost.families import text_model
from farthing.cost.flops import CONVENTION, Flops, Parameters, flops_per_token, parameters
from farthing.cost.memory import Optimizer, Precision, check_latent
from farthing.cost.shapes import shapes
from farthing.plans.efficiency import (
    NODE,
    Efficiency,
    conditions,
    default_devices,
    efficiency,
    summary,
    validation,
)
from farthing.plans.layout import USABLE, Candidate, Training, best
from farthing.recipe.dial import best_batch

LOAD = 0.70
"""Mean power over the board's limit while training: StarCoder's 280 of 400 W (arXiv:2305.06161 section 5.7)."""
SEQ_LEN = 4096
PRECISIONS = ("bf16", "fp16", "fp8", "pure-bf16")
_MOST_DEVICES = 2**18


@dataclass(frozen=True)
class Assumption:
    """An assumption of a plan, and its source."""

    what: str
    source: str


@dataclass(frozen=True)
class Plan:
    """A plan for training a network."""

    name: str
    text_only: bool
    """True if the config has another network beside the text model that is planned."""
    device: Device
    count: int
    precision: str
    optimizer: str
    tokens: float
    seq_len: int
    parameters: Parameters
    work: Flops
    """Of all tokens."""
    efficiency: Efficiency
    price: float | None
    """Dollars a device-hour; None if none is known."""
    price_source: str
    layouts: tuple[Candidate, ...]
    """That fit, best first."""
    least_bytes: float
    """Of the layout that needs least memory on a device."""
    batch_tokens: float
    batch_given: bool
    remedy: str
    """If nothing fits, the cheapest change that would make it work."""
    mixture: bool
    """True if it has mixtures of experts."""
    measured: bool
    """True if the efficiency was measured on this machine; otherwise it is the fitted model's."""

    @property
    def flops(self) -> float:
        """Model FLOPs of the run, causal attention once, without multi-token prediction (`work.mtp`)."""
        return self.work.model - self.work.mtp

    @property
    def fits(self) -> bool:
        return bool(self.layouts)

    @property
    def device_hours(self) -> Range:
        at_peak = self.work.model / (peak(self.device) * 3600)
        e = self.efficiency
        return Range(at_peak / e.high, at_peak / e.likely, at_peak / e.low)

    @property
    def wall_hours(self) -> Range:
        return self.device_hours.times(1 / self.count)

    @property
    def usd(self) -> Range | None:
        return None if self.price is None else self.device_hours.times(self.price)

    @property
    def energy_kwh(self) -> Range:
        """Of the devices alone: `LOAD` of their power limit, all of it for the high end."""
        low, likely, high = self.device_hours.times(self.device.watts / 1000)
        return Range(low * LOAD, likely * LOAD, high)

    @property
    def limited_by(self) -> str:
        return self.layouts[0].limited_by if self.layouts else "memory"

    @property
    def mfu(self) -> dict[str, float]:
        """Of the 16-bit peak over the likely hours, multi-token prediction apart as DeepSeek reports it."""
        done = self.device_hours.likely * 3600 * peak(self.device)
        return {"causal": self.flops / done, "full": (self.work.model_full - self.work.mtp_full) / done}

    def assumptions(self) -> list[Assumption]:
        return list(_assumptions(self))

    def as_json(self) -> dict[str, Any]:
        """The plan as `farthing plan --json` prints it."""
        top = self.layouts[0] if self.layouts else None
        return {
            "name": self.name,
            "device": self.device.name,
            "count": self.count,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "tokens": self.tokens,
            "seq_len": self.seq_len,
            "flops": self.flops,
            "flops_vector": asdict(self.work),
            "flops_convention": CONVENTION,
            "peak_flops": dict(self.device.peak_flops),
            "params_total": self.parameters.total,
            "params_active": self.parameters.active,
            "params_embedding": self.parameters.embedding,
            "device_hours": self.device_hours.as_json(),
            "wall_hours": self.wall_hours.as_json(),
            "usd": None if self.usd is None else self.usd.as_json(),
            "usd_per_device_hour": self.price,
            "price_source": self.price_source,
            "energy_kwh": self.energy_kwh.as_json(),
            "memory_bytes_per_device": top.memory_bytes if top else self.least_bytes,
            "memory_bytes_of_device": self.device.memory_bytes,
            "fits": self.fits,
            "remedy": self.remedy or None,
            "layout": top.as_json() if top else None,
            "batch_tokens": self.batch_tokens,
            "alternatives": [
                {
                    **other.as_json(),
                    "memory_bytes_per_device": other.memory_bytes,
                    "slower": other.step / self.layouts[0].step - 1,
                }
                for other in self.layouts[1:]
            ],
            "limited_by": self.limited_by,
            "mfu": self.mfu,
            "efficiency": asdict(self.efficiency),
            "assumptions": [asdict(assumption) for assumption in self.assumptions()],
        }


def plan_training(
    config: Mapping[str, Any],
    *,
    tokens: float,
    device: Device,
    count: int | None = None,
    seq_len: int | None = None,
    precision: str = "bf16",
    optimizer: Optimizer = "adamw",
    batch: int | None = None,
    price: float | None = None,
    rates: Mapping[str, float] | None = None,
    name: str = "",
    reached: Efficiency | None = None,
) -> Plan:
    """Plan pretraining of the network of a config.json on `tokens` tokens.

    Args:
        count: devices; None takes the fewest that end it within 60 days and hold it (powers of 2).
        seq_len: tokens of a sequence; None takes 4,096, or what the config's positions allow if less.
        precision: bf16, fp16, fp8 for the products of linear layers, or pure-bf16 for all states in bfloat16.
        batch: sequences of an optimizer step; None takes DeepSeek LLM's law.
        price: dollars a device-hour; None takes `rates`, or the catalogue's first price.
        reached: what the device was measured to reach, in place of the fitted model.

    Raises UserError for a network or device of which too little is known, a price that is not above 0, FP8 on
    a device without it, and a latent cache larger than the one it replaces.
    """
    whole, config = config, text_model(config)
    check_count(count)
    check_precision(precision, device)
    if seq_len is not None and seq_len < 1:
        raise UserError(f"--seq-len {seq_len}: must be at least 1")
    seq_len = seq_len or min(SEQ_LEN, known_context(config) or SEQ_LEN)
    check_latent(config)
    check_context(config, seq_len)
    check_batch(batch, count)
    per_token = flops_per_token(config, seq_len)
    work = per_token * tokens
    batch_tokens = best_batch(work.model) if batch is None else float(batch * seq_len)
    training = Training(precision=memory_precision(precision), optimizer=optimizer)
    paid, source = checked_price(device, price, rates)
    start = count or default_devices(work.model, device)
    layouts, least = _layouts(config, device, start, seq_len, batch_tokens, training)
    while count is None and not layouts and start < _MOST_DEVICES:
        start *= 2
        layouts, least = _layouts(config, device, start, seq_len, batch_tokens, training)
    return Plan(
        name=name or str(whole.get("model_type")),
        text_only=config is not whole,
        device=device,
        count=start,
        precision=precision,
        optimizer=optimizer,
        tokens=tokens,
        seq_len=seq_len,
        parameters=parameters(config),
        work=work,
        efficiency=reached
        or efficiency(conditions(config, per_token, device, start, seq_len=seq_len, precision=precision)),
        measured=reached is not None,
        price=paid,
        price_source=source,
        layouts=tuple(layouts),
        least_bytes=least,
        batch_tokens=batch_tokens,
        batch_given=batch is not None,
        remedy="" if layouts else _remedy(config, device, start, seq_len, batch_tokens, training),
        mixture=any(layer.sparse for layer in shapes(config).layers),
    )


def check_precision(precision: str, device: Device) -> None:
    """Raises UserError for a precision that does not exist, and FP8 on a device without it."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: must be {', '.join(PRECISIONS)}")
    if precision == "fp8" and "float8" not in device.peak_flops:
        raise UserError(f"{device.name} has no FP8; leave --precision at bf16")


def check_count(count: int | None) -> None:
    """Raises UserError for an impossible number of devices."""
    if count is not None and not 1 <= count <= _MOST_DEVICES:
        raise UserError(f"--count {count}: must be between 1 and {_MOST_DEVICES}")


def check_context(config: Mapping[str, Any], seq_len: int) -> None:
    """Raises UserError for sequences longer than the model's context, where its config gives one."""
    context = known_context(config)
    if context is not None and seq_len > context:
        raise UserError(f"--seq-len {seq_len}: the model's context is {context} tokens; give at most those")


def check_batch(batch: int | None, count: int | None) -> None:
    """Raises UserError for a batch that leaves a device without a sequence."""
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: must be at least 1")
    if batch is not None and count is not None and batch < count:
        raise UserError(
            f"--batch {batch}: fewer sequences than the {count} devices; give at least {count}, or lower --count"
        )


def memory_precision(precision: str) -> Precision:
    """The precision as `cost.memory` counts it; fp16 takes what bf16 does."""
    kept: dict[str, Precision] = {"fp8": "fp8", "pure-bf16": "pure-bf16"}
    return kept.get(precision, "bf16")


def _layouts(
    config: Mapping[str, Any], device: Device, count: int, seq_len: int, batch: float, training: Training
) -> tuple[list[Candidate], float]:
    """The best layout and up to three that differ from it in how they split, and the least memory."""
    fitting, least = best(config, device, count, seq_len, batch, training)
    chosen: list[Candidate] = []
    for candidate in fitting:
        split = (candidate.layout.tensor, candidate.layout.pipeline, candidate.layout.zero)
        if split not in [(c.layout.tensor, c.layout.pipeline, c.layout.zero) for c in chosen]:
            chosen.append(candidate)
    return chosen[:4], least.memory_bytes


def _remedy(
    config: Mapping[str, Any], device: Device, count: int, seq_len: int, batch: float, training: Training
) -> str:
    """The cheapest of: more of the same devices, as many of a larger one."""
    ways: list[tuple[float, str]] = []
    more = count
    while more < 64 * count:
        more *= 2
        if best(config, device, more, seq_len, batch, training)[0]:
            price = device.prices[0].usd if device.prices else math.inf
            ways.append((more * price, f"use {more} x {alias(device)}"))
            break
    for other in devices.catalogue():
        larger = other.kind == "gpu" and other.memory_bytes > device.memory_bytes and other.prices
        able = training.precision != "fp8" or "float8" in other.peak_flops
        if larger and able and best(config, other, count, seq_len, batch, training)[0]:
            ways.append((count * other.prices[0].usd, f"use {count} x {alias(other)}"))
    return min(ways)[1] if ways else "train a smaller model"


def alias(device: Device) -> str:
    """The device's shortest name."""
    return device.aliases[0] if device.aliases else device.name


def checked_price(
    device: Device, price: float | None, rates: Mapping[str, float] | None = None
) -> tuple[float | None, str]:
    """Dollars a device-hour and their source; None if no price is known. Raises UserError for one not above 0."""
    if price is not None:
        if not 0 < price < math.inf:
            raise UserError(f"--price {price:g}: dollars a device-hour must be a number above 0")
        return price, "given"
    if not device.prices and not any(devices.means(key, device) for key in rates or {}):
        return None, f"no price is known for {device.name}"
    return devices.rate(device, rates)


def known_context(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest sequence that the model is made for; None if its config does not say."""
    keys = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    known = [config[key] for key in keys if isinstance(config.get(key), int) and config[key] > 0]
    return known[0] if known else None


def _assumptions(plan: Plan) -> Iterator[Assumption]:
    if plan.text_only:
        yield Assumption("only the text model is counted, not what reads images or sound", "docs/counting.md")
    if plan.measured:
        yield Assumption(
            f"{percent(plan.efficiency.likely)} of the peak, as this machine was measured; within a factor 1.5",
            "farthing calibrate",
        )
    else:
        tested = validation()
        error = summary(row.ratio for row in tested)
        covered = sum(row.in_range for row in tested) / len(tested)
        yield Assumption(
            f"{percent(plan.efficiency.likely)} of the 16-bit peak over the whole run, interruptions included; the "
            f"model is off by {percent(error['median_error'], 0)} in the median over {len(tested)} published runs, "
            f"and its range holds {percent(covered, 0)} of them, each left out of the fit",
            "farthing plan --validate",
        )
    if plan.mixture:
        yield Assumption(
            "few mixtures of experts are among those runs: take the range seriously", "docs/planning.md"
        )
    yield Assumption(
        f"{plan.device.name}: {peak(plan.device) / 1e12:g} TFLOP/s in 16 bit", plan.device.source
    )
    if plan.price is not None:
        yield Assumption(f"{hourly(plan.price)} a device", plan.price_source)
    yield Assumption(
        f"the devices draw {percent(LOAD, 0)} of their {plan.device.watts:g} W; hosts, network and cooling are apart",
        "arXiv:2305.06161 section 5.7",
    )
    law = "given" if plan.batch_given else "arXiv:2401.02954 equation 1"
    yield Assumption(f"batches of {plan.batch_tokens:.3g} tokens", law)
    yield Assumption(
        f"nodes of {NODE} devices, 50 GB/s a device between them; at most {percent(USABLE, 0)} of memory is used",
        "arXiv:2412.19437 section 3.2.2",
    )
    yield Assumption(
        "one run that succeeds: no search for settings, no failed attempts, no data, no staff", "scope"
    )


def plan_text(plan: Plan) -> str:
    """The plan as text."""
    rows = [
        (
            "model",
            f"{letters(plan.parameters.total)} parameters, {letters(plan.parameters.active)} active",
        ),
        ("tokens", f"{letters(plan.tokens)} in sequences of {plan.seq_len}"),
        ("FLOPs", f"{plan.flops:.3g} (causal attention once)"),
        ("device-hours", range_text(plan.device_hours)),
        (f"days on {plan.count}", range_text(plan.wall_hours.times(1 / 24))),
        ("dollars", range_text(plan.usd, money) if plan.usd else "no price is known: give --price"),
        ("energy", f"{range_text(plan.energy_kwh)} kWh, devices only"),
        (
            "utilisation",
            f"{percent(plan.mfu['causal'])} causal, {percent(plan.mfu['full'])} full attention",
        ),
        ("limited by", plan.limited_by),
    ]
    if plan.layouts:
        top = plan.layouts[0]
        rows.append(("layout", str(top)))
        rows.append(("memory", f"{bytes_(top.memory_bytes)} of {bytes_(plan.device.memory_bytes)} a device"))
        for other in plan.layouts[1:]:
            slower = 100 * (other.step / top.step - 1)
            rows.append(("  or", f"{other} ({bytes_(other.memory_bytes)}, {slower:+.0f}% time)"))
    else:
        rows.append(("does not fit", f"{bytes_(plan.least_bytes)} a device; {plan.remedy}"))
    width = max(len(left) for left, _ in rows)
    title = f"{plan.name}   {plan.count} x {plan.device.name}, {plan.precision}, {plan.optimizer}"
    lines = [title, *(f"  {left:{width}}  {right}" for left, right in rows), "  assumed:"]
    lines += [f"    {assumption.what} ({assumption.source})" for assumption in plan.assumptions()]
    return "\n".join(lines)
