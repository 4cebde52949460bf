"""Memory that runs out: what was being done, what the model needs for it, and what would fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farthing.base.device import free_memory
from farthing.base.errors import UserError
from farthing.base.figures import bytes_, letters
from farthing.base.limits import is_out_of_memory
from farthing.cost.flops import parameters
from farthing.cost.memory import CPU_BUFFERS, CPU_IMPORTS, code_of, memory, precision_of

_CONTEXT = 4096  # tokens of the context that is counted, or the model's own if that is shorter
_WIDE = 4  # bytes of a number while a tensor is converted


@contextmanager
def room_for(
    doing: str, folder: str | Path | None, device: str = "cpu", dtype: object = "auto"
) -> Iterator[None]:
    """Turn memory that runs out while a model answers or is loaded into a UserError.

    Args:
        doing: the sentence's beginning, as in "loading X".
        folder: of the model, if it is known.
    """
    room = could_be_had(device)
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{_ran_out(doing, device, room)}; {_serving(folder, device, dtype, room)}") from None


@contextmanager
def room_to_read(doing: str, folder: str | Path | None) -> Iterator[None]:
    """Turn memory that runs out while a model's tensors are read one at a time into a UserError."""
    room = could_be_had("cpu")
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{_ran_out(doing, 'cpu', room)}; {_reading(folder, room)}") from None


def could_be_had(device: str) -> int:
    """Bytes that are free on a device or held by this process, which are counted again by what it is going to need."""
    device = "cuda" if device.startswith("cuda") and ":" not in device else device
    if device == "cpu" or not device.startswith("cuda"):
        import psutil

        return free_memory("cpu") + int(psutil.Process().memory_info().rss)
    import torch

    return free_memory(device) + int(torch.cuda.memory_allocated(device))


def _ran_out(doing: str, device: str, room: int) -> str:
    return f"{doing} ran out of memory on {device}, where {bytes_(room)} could be had"


def _serving(folder: str | Path | None, device: str, dtype: object, room: int) -> str:
    config = _config(folder)
    if config is None:
        return "close other programs, or take a smaller model"
    limit = config.get("max_position_embeddings")
    tokens = min(_CONTEXT, limit) if isinstance(limit, int) and limit > 0 else _CONTEXT
    kind = "cpu" if not device.startswith("cuda") else "cuda"
    try:
        need = memory(
            config, kind="serve", micro_tokens=tokens, seq_len=tokens,
            precision=precision_of(dtype), code=code_of(kind),
        )  # fmt: skip
        whole = parameters(config).total
    except UserError:  # a family whose cost cannot be counted
        return "close other programs, or take a smaller model"
    says = f"the model needs about {bytes_(need.total)} for {tokens:,} tokens, {bytes_(need.weights)} of it for weights"
    if need.total <= room:
        return f"{says}: close other programs, or ask for less at once"
    fixed = min(need.runtime, CPU_IMPORTS + CPU_BUFFERS)  # the rest of it grows with the model
    fits = whole * max(0.0, room - fixed) / max(1, need.total - fixed)
    smaller = (
        f"a model of up to about {letters(fits)} parameters would fit"
        if fits >= 1e6
        else "no model would fit"
    )
    return f"{says}: {smaller}; take one, or a machine with more memory"


def _reading(folder: str | Path | None, room: int) -> str:
    from farthing.weights.folder import tensor_headers

    try:
        sizes = [math.prod(stored.shape) for stored in tensor_headers(Path(str(folder))).values()]
    except (UserError, TypeError):
        return "close other programs, and run the same command again"
    largest = _WIDE * max(sizes, default=0)
    says = f"its tensors are read one at a time, and the largest takes {bytes_(largest)} in float32"
    if largest <= room:
        return f"{says}: close other programs, and run the same command again"
    return f"{says}: one of up to {letters(room / _WIDE)} numbers would fit; take a machine with more memory"


def _config(folder: str | Path | None) -> Mapping[str, Any] | None:
    from farthing.weights.folder import read_config

    try:
        return read_config(Path(folder)) if folder is not None else None
    except UserError:
        return None
