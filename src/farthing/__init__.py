"""Farthing: build a DeepSeek-style language model from open parts, and account for every farthing.

The public face is `load`, `run` and what they return; both are imported when first used, so that the command line
answers without loading torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Completion", "Model", "UserError", "load", "run"]

from farthing.errors import UserError

if TYPE_CHECKING:
    from farthing.engine import Completion, Model, load
    from farthing.runs import run


def __getattr__(name: str) -> Any:
    if name in ("Completion", "Model", "load"):
        import farthing.engine

        return getattr(farthing.engine, name)
    if name == "run":
        import farthing.runs

        return farthing.runs.run
    raise AttributeError(f"module 'farthing' has no attribute {name!r}")
