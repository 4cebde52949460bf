"""The protocol of a sampler: the engine in this process, an inference server, or one on another machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from farthing.engine.sequence import Request, Sample, Work
from farthing.model import Decoder


class Generator(Protocol):
    """Generates, takes new weights, and reports its work; the caller books it."""

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """All samples of all requests, in their order. Raises UserError for a request that cannot be served."""

    def take_weights(self, decoder: Decoder, version: int) -> None:
        """Sample from these weights from now on. A new `version` means that they have changed, and that nothing
        computed with the old ones may be reused."""

    def done(self) -> Work:
        """The work since this was last asked."""
