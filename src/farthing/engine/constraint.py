"""Which tokens may come next: what a grammar asks of the engine."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """Leads one sample, token by token; once it is `done`, the sample ends with "stop"."""

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next: bit t % 32 of int32 word t // 32; None for any. At least one may."""

    def take(self, token: int) -> None:
        """Note a chosen token."""

    @property
    def done(self) -> bool:
        """Whether the sample is complete."""
