"""Generation: paged cache, continuous batching, prefix reuse, sampling."""

from farthing.engine.engine import Engine, Request, Sample
from farthing.engine.sampling import Sampling

__all__ = ["Engine", "Request", "Sample", "Sampling"]
