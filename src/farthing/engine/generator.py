"""The sampling interface of a trainer, shared by the in-process engine, a local inference server and a remote one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from farthing.engine.sequence import Request, Sample, Work
from farthing.model import Decoder


class Generator(Protocol):
    """Generates, takes new weights and reports its work, which the caller books."""

    def generate(self, requests: Sequence[Request]) -> list[list[Sample]]:
        """Return all samples of all requests, in order. Raises UserError for a request that cannot be served."""

    def take_weights(self, decoder: Decoder, version: int) -> None:
        """Sample from these weights from now on. A new `version` means that they changed: discard everything computed
        with the old ones."""

    def done(self) -> Work:
        """Return the work since the last call."""
