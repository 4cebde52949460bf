"""A plan as a person reads it."""

from __future__ import annotations

from farthing.cost.plan import Plan, Range, short


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    rows = [
        ("model", f"{short(plan.parameters.total)} parameters, {short(plan.parameters.active)} active"),
        ("tokens", f"{short(plan.tokens)} in sequences of {plan.seq_len}"),
        ("FLOPs", f"{plan.flops:.3g} (causal attention once)"),
        ("device-hours", range_text(plan.device_hours)),
        (f"days on {plan.count}", range_text(plan.wall_hours.times(1 / 24))),
        ("dollars", range_text(plan.usd, "$") if plan.usd else "no price is known: give --price"),
        ("energy", f"{range_text(plan.energy_kwh)} kWh, devices only"),
        (
            "utilisation",
            f"{100 * plan.mfu['causal']:.1f}% causal, {100 * plan.mfu['full']:.1f}% full attention",
        ),
        ("limited by", plan.limited_by),
    ]
    if plan.layouts:
        top = plan.layouts[0]
        rows.append(("layout", str(top)))
        rows.append(
            ("memory", f"{top.memory_bytes / 1e9:.1f} of {plan.device.memory_bytes / 1e9:.0f} GB a device")
        )
        for other in plan.layouts[1:]:
            slower = 100 * (other.step / top.step - 1)
            rows.append(("  or", f"{other} ({other.memory_bytes / 1e9:.1f} GB, {slower:+.0f}% time)"))
    else:
        rows.append(("does not fit", f"{plan.least_bytes / 1e9:.1f} GB a device; {plan.remedy}"))
    width = max(len(left) for left, _ in rows)
    title = f"{plan.name}   {plan.count} x {plan.device.name}, {plan.precision}"
    lines = [title, *(f"  {left:{width}}  {right}" for left, right in rows), "  assumed:"]
    lines += [f"    {assumption.what} ({assumption.source})" for assumption in plan.assumptions()]
    return "\n".join(lines)


def range_text(values: Range, unit: str = "") -> str:
    """The likely value, and the low and high one in brackets."""

    def text(value: float) -> str:
        return f"{unit}{value:,.0f}" if value >= 100 else f"{unit}{value:.3g}"

    return f"{text(values.likely)}  ({text(values.low)} to {text(values.high)})"
