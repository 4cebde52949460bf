"""A claim about a model's cost, as a small YAML: reported figures, their sources, and what they leave out.

docs/claims.md describes every key. Nothing here judges: `check.py` does the arithmetic.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from farthing.base.arguments import takes
from farthing.base.errors import UserError
from farthing.base.limits import named
from farthing.base.schema import Strict, checked, parse_text, read_yaml
from farthing.cost import devices
from farthing.cost.fields import MOST, Date, Positive, Text

Evidence = Literal["read", "secondary", "recalled"]
"""P: the source itself was read; S: a quotation of it; R: recalled from memory, to be checked first."""


class Figures(Strict):
    """Reported figures of a run, or of a part of it; nothing derived goes in here."""

    device: Text | None = None
    """A name that `devices.find` knows."""
    devices: Positive | None = None
    hours: Positive | None = None
    """Wall clock."""
    days: Positive | None = None
    device_hours: Positive | None = None
    price_per_device_hour: Positive | None = None
    """Dollars."""
    our_price_per_device_hour: Positive | None = None
    """Dollars: an assumption of whoever wrote this file, where the claim names no rent. It is marked as ours, and what
    rests on it is not judged."""
    dollars: Positive | None = None
    tokens: Positive | None = None
    tokens_are: Literal["reported", "at most"] = "reported"
    seq_len: Annotated[int, Field(gt=0, le=10**9)] | None = None
    flops: Positive | None = None
    precision: Literal["bf16", "fp16", "fp8"] = "bf16"
    mfu_percent: Positive | None = None
    """Of the BF16 peak, in the claim's own convention."""
    tflops_per_device: Positive | None = None
    tokens_per_second_per_device: Positive | None = None
    energy_mwh: Positive | None = None
    tonnes_co2e: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _in_dollars(cls, data: Any) -> Any:
        """Amounts of other currencies have keys or signs of their own: say what to do with them."""
        for key, value in data.items() if isinstance(data, dict) else ():
            foreign = isinstance(value, str) and key in _AMOUNTS and _CURRENCY.search(value)
            if foreign or str(key).lower() in _CURRENCIES:
                raise ValueError(
                    f"{key}: amounts are in US dollars; convert {str(value)[:40]!r} and give the rate in a note"
                )
        return data

    def given(self) -> list[str]:
        """The names of the figures that are given."""
        return [
            name for name in type(self).model_fields
            if name not in _NOT_FIGURES and getattr(self, name) is not None
        ]  # fmt: skip


_AMOUNTS = ("dollars", "price_per_device_hour", "our_price_per_device_hour")
_CURRENCIES = (
    "currency",
    "euros",
    "eur",
    "yuan",
    "cny",
    "rmb",
    "yen",
    "jpy",
    "pounds",
    "gbp",
    "won",
    "krw",
    "rupees",
    "inr",
)
_CURRENCY = re.compile(
    r"[€£¥₩₹]|\b(?:eur|euros?|cny|rmb|yuan|jpy|yen|gbp|pounds?|krw|won|inr|rupees?|chf)\b", re.IGNORECASE
)
_NOT_FIGURES = ("name", "tokens_are", "precision", "our_price_per_device_hour")


class Part(Figures):
    """One stage of a run; it inherits a missing device, price or precision from the claim."""

    name: Text


class Source(Strict):
    """A source: who says it, where, and when."""

    of: Annotated[list[Text], Field(min_length=1)]
    """Figures of `reported`; or `parts`, `architecture`, `params`."""
    text: Text
    date: Date
    evidence: Evidence


class Excluded(Strict):
    """A cost that the claim's price excludes, with a range if a source gives one."""

    what: Text
    multiple: list[float] | None = None
    """[low, high], in units of the claimed price."""
    amount: list[float] | None = None
    """[low, high], dollars."""
    source: Text | None = None
    """Empty if nobody has published a figure."""
    date: Date | None = None
    evidence: Evidence | None = None

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        ranges = [given for given in (self.multiple, self.amount) if given is not None]
        if len(ranges) > 1:
            raise ValueError("give multiple or amount, not both")
        for given in ranges:
            if len(given) != 2 or not 0 <= given[0] <= given[1] <= MOST:
                raise ValueError(f"a range is [low, high], got {given}")
        if ranges and not (self.source and self.date and self.evidence):
            raise ValueError("a range needs a source, a date and evidence")
        return self


class OtherSource(Strict):
    """The same figure from another source."""

    figure: Literal["device_hours", "dollars", "tokens", "devices", "energy_mwh", "tonnes_co2e"]
    value: Positive
    source: Text
    date: Date
    evidence: Evidence


class Note(Strict):
    """A note for readers; no check uses it."""

    text: Text
    source: Text
    date: Date


class Claim(Strict):
    """A claim, its sources and its gaps."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
    title: Text
    about: Text
    """The claim in a sentence or two."""
    reported: Figures
    parts: list[Part] = Field(default_factory=list)
    architecture: dict[str, Any] | None = None
    """A Hugging Face config."""
    params: Positive | None = None
    """Active parameters, where the architecture is not published."""
    excluded: list[Excluded] = Field(default_factory=list)
    elsewhere: list[OtherSource] = Field(default_factory=list)
    notes: list[Note] = Field(default_factory=list)
    sources: Annotated[list[Source], Field(min_length=1)]
    same_runs: list[Text] = Field(default_factory=list)
    """Rows of published_runs.csv that are this run; they are not evidence for it."""

    @model_validator(mode="after")
    def _every_figure_has_a_source(self) -> Self:
        if self.architecture is not None and self.params is not None:
            raise ValueError("give architecture or params, not both")
        sourced = {name for source in self.sources for name in source.of}
        given = [*self.reported.given()]
        given += [name for name in ("parts", "architecture", "params") if getattr(self, name)]
        if missing := [name for name in given if name not in sourced]:
            raise ValueError(f"no source is given for {', '.join(missing)}: name them in a source's `of`")
        if unknown := sourced - {*Figures.model_fields, "parts", "architecture", "params"}:
            raise ValueError(f"a source is `of` {', '.join(sorted(unknown))}, which is not a figure")
        return self

    def runs(self) -> Iterator[tuple[str, Figures]]:
        """The parts, with the claim's device, price and precision where they have none; else the whole."""
        if not self.parts:
            yield "the run", self.reported
        for part in self.parts:
            inherited = {
                name: getattr(self.reported, name)
                for name in ("device", "price_per_device_hour")
                if getattr(part, name) is None
            }
            yield part.name, part.model_copy(update=inherited)


@takes(name_or_path=(str, Path))
def load(name_or_path: str | Path) -> Claim:
    """Load a built-in claim by name, or your own by the path of its YAML file.

    Raises UserError that names the wrong key, or the nearest name of a claim.
    """
    name_or_path, shipped = str(name_or_path), builtin()
    if name_or_path in shipped:
        file = resources.files("farthing") / "claims" / f"{name_or_path}.yaml"
        return parse(parse_text(file.read_text("utf-8"), name_or_path), name_or_path)
    path = named(name_or_path)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return parse(read_yaml(path), name_or_path)
    near = difflib.get_close_matches(name_or_path, shipped, n=2, cutoff=0.4)
    hint = f"try {' or '.join(near)}" if near else f"there are {', '.join(shipped)}"
    raise UserError(f"{name_or_path}: no such claim; {hint}, or give the path of a YAML file")


def parse(data: Any, name: str) -> Claim:
    """The claim in `data`. Raises UserError as `load`."""
    claim = checked(Claim, data, name)
    for _, figures in claim.runs():
        if figures.device is not None:
            devices.find(figures.device)
    return claim


def builtin() -> list[str]:
    """The names of the built-in claims."""
    files = (resources.files("farthing") / "claims").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
