"""Published training runs (published_runs.csv): the data behind the efficiency model and its tests.

A row is a run of which hours, tokens and sizes were published, with its source and how well that is known
(evidence P: the primary text was read, S: a secondary one, R: recalled). `scope` says what the hours cover and
was decided from what the source says of them, never from how well they fit:

    run          one training run, as a planner plans it
    card         all training hours of a model card, which may cover more than one clean pass
    distilled    a pruned model that was trained on the logits of larger ones
    steady       tokens a second while all goes well: no interruptions, no whole run

and `use` what the row is good for: `test` (the efficiency model is fitted and tested on it), `approximate`
(sizes or hours are rounded or bounds: fitted on, not tested on), `steady` (likewise), `computed` (the hours were
computed from a utilisation, so that they say nothing of hours: neither), and `implausible` (the figures
contradict physics or themselves; what checks claims has to find them out).
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from farthing.cost.devices import Device, find, peak
from farthing.cost.flops import Flops, flops_per_token

BASELINE = 0.40
"""Share of peak that the baseline takes every run to reach (cost per token exact, causal)."""


@dataclass(frozen=True, eq=False)  # each row is itself, so that fits can be kept by their rows
class PublishedRun:
    """A row of published_runs.csv."""

    name: str
    model: str
    laboratory: str
    """Whose training program it was; rows of one share its habits."""
    year: int
    """Of publication."""
    scope: str
    use: str
    config: Mapping[str, Any] | None
    """The sizes as a Hugging Face config; None if they were not published in full."""
    width: int
    moe: bool
    active: float
    """Parameters that a token passes through, as published."""
    tokens: float
    seq_len: int
    device: Device
    devices: int | None
    precision: str
    device_hours: float
    tokens_per_second: float
    """Of one device; steady rows only."""
    reported_flops: float
    """As the source states them; 0 where it does not."""
    source: str
    evidence: str
    notes: str

    @property
    def per_token(self) -> Flops:
        """Training FLOPs of a token; 6 x active parameters where the sizes are not known in full."""
        if self.config is None:
            return Flops(linear=6 * self.active)
        return flops_per_token(self.config, self.seq_len, mtp=False)

    @property
    def mfu(self) -> float:
        """Share of the 16-bit peak that the published hours imply, causal attention counted once."""
        speed = self.tokens_per_second if self.use == "steady" else self.tokens / self.device_hours / 3600
        return self.per_token.model * speed / peak(self.device)


@functools.cache
def published_runs() -> tuple[PublishedRun, ...]:
    """All rows, in the file's order."""
    text = resources.files("farthing.cost").joinpath("published_runs.csv").read_text(encoding="utf-8")
    return tuple(_run(row) for row in csv.DictReader(text.splitlines()))


def validation_runs() -> tuple[PublishedRun, ...]:
    """The rows that the efficiency model is tested on."""
    return tuple(run for run in published_runs() if run.use == "test")


def _run(row: Mapping[str, str]) -> PublishedRun:
    def number(key: str) -> float:
        return float(row[key] or 0)

    return PublishedRun(
        name=row["run"],
        model=row["model"],
        laboratory=row["laboratory"],
        year=int(row["year"]),
        scope=row["scope"],
        use=row["use"],
        config=_config(row) if row["heads"] and row["ffn"] else None,
        width=int(row["width"]),
        moe=bool(row["experts"]),
        active=number("active_b") * 1e9,
        tokens=number("tokens_b") * 1e9,
        seq_len=int(row["seq_len"]),
        device=find(row["device"]),
        devices=int(row["devices"]) if row["devices"] else None,
        precision=row["precision"],
        device_hours=number("device_hours"),
        tokens_per_second=number("tokens_per_second"),
        reported_flops=number("flops"),
        source=row["source"],
        evidence=row["evidence"],
        notes=row["notes"],
    )


def _config(row: Mapping[str, str]) -> dict[str, Any]:
    """The row's sizes under the keys of a family that has just those matrices."""
    config: dict[str, Any] = {"model_type": _family(row), "tie_word_embeddings": row["tied"] == "1"}
    for key, column in _KEYS.items():
        if row[column]:
            config[key] = int(row[column])
    return config


def _family(row: Mapping[str, str]) -> str:
    if row["kv_lora"]:
        return "deepseek_v3"
    if row["experts"]:
        return "glm4_moe"  # grouped queries, and experts beside shared ones
    if row["window"]:
        return "olmo3"  # three of four layers slide
    return "llama" if row["ffn_matrices"] == "3" else "nemotron"  # a gated feed-forward block, or a plain one


_KEYS = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "ffn",
    "vocab_size": "vocab",
    "sliding_window": "window",
    "n_routed_experts": "experts",
    "num_experts_per_tok": "top_k",
    "n_shared_experts": "shared",
    "moe_intermediate_size": "expert_size",
    "first_k_dense_replace": "dense_layers",
    "q_lora_rank": "q_lora",
    "kv_lora_rank": "kv_lora",
    "qk_nope_head_dim": "nope",
    "qk_rope_head_dim": "rope",
    "v_head_dim": "v",
    "num_nextn_predict_layers": "mtp_depth",
}
