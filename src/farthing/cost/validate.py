"""The efficiency model's examination, as a table: each published run beside what a model without it predicts."""

from __future__ import annotations

from typing import Any

from farthing.cost.efficiency import coefficients, spread, summary, validation, without_families
from farthing.cost.runs_table import BASELINE, published_runs


def validation_json() -> dict[str, Any]:
    """Rows, and summaries of the model told nothing of scopes, told them, and of the baseline."""
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
    """The table as a person reads it."""
    found = validation_json()
    lines = [f"{'run':22} {'scope':9} {'reported':>10} {'predicted':>10} {'ratio':>6}  in range"]
    for row in found["rows"]:
        lines.append(
            f"{row['run']:22} {row['scope']:9} {_hours(row['reported_hours']):>10} "
            f"{_hours(row['predicted_hours']):>10} {row['ratio']:6.2f}  {'yes' if row['in_range'] else 'no'}"
        )
    lines.append(
        "device-hours; every run is predicted by a fit that never saw it, as one clean run of its size"
    )
    names = {
        "model": "the model",
        "model_on_single_runs": "  of these, single runs",
        "model_told_scopes": "the model, told the scopes",
        "model_without_family": "fitted without its family",
        "baseline": f"baseline: {100 * BASELINE:.0f}% of peak",
    }
    for key, name in names.items():
        s = found["summary"][key]
        lines.append(
            f"{name:28} {s['runs']:3} runs: median error {100 * s['median_error']:.1f}%, "
            f"{100 * s['within_2']:.0f}% within a factor 2, {100 * s['within_1_6']:.0f}% within 1.6"
        )
    lines.append(f"the low-high range holds {100 * found['summary']['in_range']:.0f}% of the runs")
    lines.append(
        "card: the hours of a model card, which cover more than one clean pass; distilled: a pruned model "
        "trained on the logits of others"
    )
    lines += [f"not tested on: {row['run']} ({row['why']})" for row in found["left_out"]]
    return "\n".join(lines)


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
