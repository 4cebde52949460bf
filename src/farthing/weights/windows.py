"""Sliding windows in a config.json: which layers attend to the last tokens only, as transformers understands it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from farthing.base.errors import UserError
from farthing.weights.settings import Settings

_SLIDES = {"full_attention": False, "sliding_attention": True}


def windows_everywhere(settings: Settings, used: bool = True) -> dict[str, Any]:
    """The fields of a network whose layers all slide if there is a `sliding_window` (Mistral, Mixtral, Phi-3,
    Qwen3-MoE).

    Args:
        used: false if the config switches its window off.

    Raises:
        UserError: for a window that is no length, and for `layer_types` that say otherwise: transformers ignores them
            in these families, and others obey them.
    """
    slides = settings.whole_or("sliding_window", 0) > 0 and used
    kinds = _kinds(settings)
    if kinds is not None and set(kinds) != {slides}:
        raise UserError(
            f"config.json: layer_types contradicts sliding_window {settings.get('sliding_window')!r}: in a "
            f"{settings['model_type']} every layer slides if one does; leave it out"
        )
    return _fields(settings, [slides] * settings.whole("num_hidden_layers"))


def refuse_windows(settings: Settings) -> None:
    """Refuse `layer_types` that slide in a family without windows, as transformers does."""
    if any(_kinds(settings) or ()):
        raise UserError(
            f"config.json: layer_types has sliding_attention, which a {settings['model_type']} does not have; leave it "
            "out"
        )


def windows_by_layer(settings: Settings, usual: Callable[[int], bool], used: bool = True) -> dict[str, Any]:
    """The fields of a network where `layer_types` says which layers slide, or `usual` where it does not.

    Args:
        used: false if the config switches its window off.

    Raises:
        UserError: for `layer_types` that is no list of known kinds, one a layer, and for a layer that slides without
            a window.
    """
    window = settings.whole_or("sliding_window", 0)
    kinds = _kinds(settings)
    if kinds is None:
        kinds = [usual(layer) for layer in range(settings.whole("num_hidden_layers"))]
    if any(kinds) and not (window and used):
        raise UserError(
            "config.json: layer_types has sliding_attention, but there is no sliding_window in use; set it, or "
            "full_attention for every layer"
        )
    return _fields(settings, kinds)


def _kinds(settings: Settings) -> list[bool] | None:
    """For each layer whether `layer_types` says that it slides; None without the key."""
    layers, kinds = settings.whole("num_hidden_layers"), settings.get("layer_types")
    if kinds is None:
        return None
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or not all(kind in list(_SLIDES) for kind in kinds)
    ):
        raise UserError(
            f"config.json: layer_types is {str(kinds)[:60]}; supported is a list of full_attention or "
            f"sliding_attention for each of the {layers} layers"
        )
    return [_SLIDES[kind] for kind in kinds]


def _fields(settings: Settings, slides: list[bool]) -> dict[str, Any]:
    sliding = tuple(layer for layer, yes in enumerate(slides) if yes)
    return {"window": settings.whole("sliding_window") if sliding else None, "sliding": sliding}
