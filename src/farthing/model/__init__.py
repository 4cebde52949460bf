"""The network. `Decoder` expresses every family by its `ModelConfig`."""

from farthing.model.attention import Attend, Segments
from farthing.model.config import ModelConfig, Rope
from farthing.model.decoder import Decoder

__all__ = ["Attend", "Decoder", "ModelConfig", "Rope", "Segments"]
