"""Model folders in and out: the functions that every stage loads and saves with.

They are imported on first use: a .gguf is imported, and a folder described, without loading torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farthing.weights.decoders import export_tensors, folder_config, load_decoder, save_decoder
    from farthing.weights.layouts import decoder_config

__all__ = ["decoder_config", "export_tensors", "folder_config", "load_decoder", "save_decoder"]


def __getattr__(name: str) -> Any:
    if name == "decoder_config":
        from farthing.weights.layouts import decoder_config

        return decoder_config
    if name in __all__:
        from farthing.weights import decoders

        return getattr(decoders, name)
    raise AttributeError(f"module 'farthing.weights' has no attribute {name!r}")
