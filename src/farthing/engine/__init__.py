"""Generation: paged cache, continuous batching, prefix reuse, sampling."""

from farthing.engine.engine import Engine
from farthing.engine.model import Completion, Model, at_place, load
from farthing.engine.sampling import Sampling
from farthing.engine.sequence import Request, Sample

__all__ = ["Completion", "Engine", "Model", "Request", "Sample", "Sampling", "at_place", "load"]
