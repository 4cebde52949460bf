"""The network: one `Decoder` for every family, described by a `ModelConfig`."""

from farthing.model.attention import Attend, Segments
from farthing.model.config import Mla, ModelConfig, Moe, Rope
from farthing.model.decoder import Decoder
from farthing.model.moe import Routing, routers, update_biases

__all__ = [
    "Attend",
    "Decoder",
    "Mla",
    "ModelConfig",
    "Moe",
    "Rope",
    "Routing",
    "Segments",
    "routers",
    "update_biases",
]
