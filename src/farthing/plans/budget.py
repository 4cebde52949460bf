"""The inverse plan: the largest model and the most tokens that a sum of money pays for.

Money buys device-hours, these buy FLOPs C at the fitted efficiency, and a scaling law splits C into N
parameters and D tokens so that the loss comes out lowest:

* Chinchilla (Hoffmann et al., arXiv:2203.15556, section 3.3 and appendix D.3): the minimum of
  L(N, D) = E + A / N^a + B / D^b where C = 6 N D, which is N = G (C/6)^(b/(a+b)), D = (C/6)^(a/(a+b)) / G with
  G = (a A / (b B))^(1/(a+b)).
* The same law refitted to the same runs (Besiroglu et al., arXiv:2404.10102), whose constants agree with the
  paper's other two methods, about 20 tokens a parameter.
* DeepSeek LLM (arXiv:2401.02954, equation 4): M = 0.1715 C^0.5243 non-embedding FLOPs a token and
  D = 5.8316 C^0.4757 tokens; N is given here as M / 6.
* Counting use as well (Sardana et al., arXiv:2401.00448, section 2): the lowest L where training and answering
together are paid for, C = 6 N D + 2 N D', with D' tokens read and written in use.

The constants were taken from texts that quote the papers. The laws were fitted between 1e17 and 1e22 FLOPs, on
their authors' data; beyond that they are extrapolations.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from farthing.base.figures import Range, exact, hourly, letters, money, range_text
from farthing.cost.devices import Device, peak
from farthing.plans.efficiency import Conditions, Efficiency, balance, default_devices, efficiency

_SEQ_LEN = 4096


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    name: str
    source: str
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token, on the law's data."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    def split(self, flops: float) -> tuple[float, float]:
        """(N, D) of the lowest loss with 6 N D FLOPs."""
        both = self.alpha + self.beta
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / both)
        return g * (flops / 6) ** (self.beta / both), (flops / 6) ** (self.alpha / both) / g


CHINCHILLA = Law("Chinchilla", "arXiv:2203.15556 section 3.3", 1.69, 406.4, 410.7, 0.34, 0.28)
REFIT = Law("Chinchilla, refitted", "arXiv:2404.10102", 1.8172, 482.01, 2085.43, 0.3478, 0.3658)
DEEPSEEK_SOURCE = "arXiv:2401.02954 equation 4"
SERVED_SOURCE = "arXiv:2401.00448 section 2, with the refitted law"


@dataclass(frozen=True)
class Choice:
    """Model and tokens that the money buys under one law."""

    law: str
    source: str
    parameters: Range
    """For the fewest, the likely and the most FLOPs that the money may pay for."""
    tokens: Range
    loss: float | None
    """Loss under the law at the likely size; None if the law has none."""


@dataclass(frozen=True)
class Budget:
    """FLOPs, models and tokens that a sum of money pays for on a device."""

    dollars: float
    device: Device
    price: float
    price_source: str
    device_hours: float
    devices: int
    flops: Range
    efficiency: Efficiency
    inference_tokens: float | None
    choices: tuple[Choice, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "dollars": self.dollars,
            "device": self.device.name,
            "usd_per_device_hour": self.price,
            "price_source": self.price_source,
            "device_hours": self.device_hours,
            "count": self.devices,
            "flops": self.flops.as_json(),
            "efficiency": asdict(self.efficiency),
            "inference_tokens": self.inference_tokens,
            "choices": [
                {
                    "law": choice.law,
                    "source": choice.source,
                    "parameters": choice.parameters.as_json(),
                    "tokens": choice.tokens.as_json(),
                    "loss": choice.loss,
                }
                for choice in self.choices
            ],
        }


def budget(
    dollars: float,
    device: Device,
    price: float,
    price_source: str,
    *,
    precision: str = "bf16",
    count: int | None = None,
    inference_tokens: float | None = None,
) -> Budget:
    """The models that `dollars` pay for.

    Args:
        price: dollars a device-hour.
        inference_tokens: that the model will read and write in use; None takes as many as it is trained on.
    """
    hours = dollars / price
    reached, devices = None, count or 1
    for _ in range(4):  # the efficiency depends on the size, and the size on what the efficiency pays for
        paid = hours * 3600 * peak(device) * (reached.likely if reached else 0.4)
        devices = count or default_devices(paid, device)
        work = 6 * REFIT.split(paid)[0]
        reached = efficiency(Conditions(work, _SEQ_LEN, balance(device), devices, fp8=precision == "fp8"))
    assert reached is not None
    at_peak = hours * 3600 * peak(device)
    flops = Range(at_peak * reached.low, at_peak * reached.likely, at_peak * reached.high)
    return Budget(
        dollars=dollars,
        device=device,
        price=price,
        price_source=price_source,
        device_hours=hours,
        devices=devices,
        flops=flops,
        efficiency=reached,
        inference_tokens=inference_tokens,
        choices=tuple(_choices(flops, inference_tokens)),
    )


def deepseek_split(flops: float) -> tuple[float, float]:
    """(N, D) of DeepSeek LLM's law; N is a sixth of its non-embedding FLOPs a token."""
    return 0.1715 * flops**0.5243 / 6, 5.8316 * flops**0.4757


def served_split(flops: float, inference_tokens: float | None, law: Law = REFIT) -> tuple[float, float]:
    """(N, D) of the lowest loss where 6 N D + 2 N D' = `flops`; D' None stands for D."""
    if inference_tokens is None:
        return law.split(flops * 6 / 8)
    best, found = math.inf, law.split(flops)
    top = flops / (2 * inference_tokens)  # a model this large would have no FLOPs left to be trained with
    for step in range(1, 2000):
        parameters = top * 10 ** (-6 * step / 2000)
        tokens = (flops - 2 * parameters * inference_tokens) / (6 * parameters)
        if tokens > 0 and law.loss(parameters, tokens) < best:
            best, found = law.loss(parameters, tokens), (parameters, tokens)
    return found


def budget_text(found: Budget) -> str:
    """The budget as text."""
    lines = [
        f"{money(found.dollars)} on {found.device.name}: {exact(found.device_hours)} device-hours at "
        f"{hourly(found.price)} ({found.price_source}), "
        f"{found.flops.likely:.2g} FLOPs ({found.flops.low:.2g} to {found.flops.high:.2g})",
        f"  {'law':42} {'parameters':>24} {'tokens':>24}",
    ]
    two = partial(letters, digits=2)
    for choice in found.choices:
        name = f"{choice.law} ({choice.source.split()[0]})"
        lines.append(
            f"  {name:42} {range_text(choice.parameters, two):>24} {range_text(choice.tokens, two):>24}"
        )
    used = (
        "as many as it is trained on" if found.inference_tokens is None else letters(found.inference_tokens)
    )
    lines.append(f"  counting use: tokens read and written in use are {used}")
    lines.append("  the laws are extrapolated beyond about 1e22 FLOPs, and speak of their authors' data")
    return "\n".join(lines)


def _choices(flops: Range, inference_tokens: float | None) -> list[Choice]:
    splits = [
        (CHINCHILLA.name, CHINCHILLA.source, CHINCHILLA.split, CHINCHILLA),
        (REFIT.name, REFIT.source, REFIT.split, REFIT),
        ("DeepSeek LLM", DEEPSEEK_SOURCE, deepseek_split, None),
        ("counting use", SERVED_SOURCE, lambda c: served_split(c, inference_tokens), REFIT),
    ]
    choices = []
    for name, source, split, law in splits:
        sizes, tokens = zip(*(split(value) for value in flops), strict=True)
        loss = law.loss(sizes[1], tokens[1]) if law else None
        choices.append(Choice(name, source, Range(*sizes), Range(*tokens), loss))
    return choices
