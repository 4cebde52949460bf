"""llama.cpp as a peer: greedy decoding of several sequences a step, through its Python binding's low-level API.

`make bench-llama` builds the binding from its source package into .venv/llama, which takes cmake, a C++ compiler and
some ten minutes of a core; nothing else here needs it. Models are Farthing's own exports. Every sequence has a cache of
its own (one for all is slower), and flash attention is on or off, whichever is faster on the benchmark's own work.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from side_by_side import say, timed

from farthing.weights.gguf_write import export_gguf

BUILT = Path(__file__).resolve().parents[1] / ".venv" / "llama"
# its types of file beside each of our engine's precisions; of its four bits it repacks q4_0 only, and reads it fastest
AS = {"exact": ("bf16",), "int8": ("q8_0",), "int4": ("q4_1", "q4_0")}
_TRIED = 512  # tokens of each prompt on which flash attention is tried
_AT_ONCE = 2048  # tokens of prompts a call; it computes 512 of them at a time


def binding() -> ModuleType | None:
    """The binding's low-level module; None, said in a line, if it is not installed or does not load."""
    if BUILT.is_dir() and str(BUILT) not in sys.path:
        sys.path.append(str(BUILT))  # last, so that what else lies there replaces nothing
    try:
        return importlib.import_module("llama_cpp.llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        why = (
            "it is not installed" if isinstance(error, ModuleNotFoundError) else " ".join(str(error).split())
        )
        say(f"llama.cpp skipped: {why}; `make bench-llama` builds it")
        return None


def exported(folder: Path, into: Path, kind: str) -> Path:
    """The model folder as a .gguf of this type, in `into`, written by Farthing's own export."""
    path = into / f"{kind}.gguf"
    if not path.exists():
        export_gguf(folder, path, kind)
    return path


class LlamaCpp:
    """A loaded .gguf with room for `sequences` of `positions` tokens each."""

    def __init__(
        self,
        lib: ModuleType,
        file: Path,
        sequences: int,
        positions: int,
        threads: int,
        *,
        flash: bool = False,
    ) -> None:
        self.lib = lib
        lib.llama_backend_init()
        lib.llama_log_set(_silent(lib), ctypes.c_void_p(0))
        self.model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {file}"
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        settings = lib.llama_context_default_params()
        each = -(-positions // 256) * 256  # it rounds up to this itself
        settings.n_ctx, settings.n_seq_max = sequences * each, sequences
        settings.n_batch, settings.n_ubatch = _AT_ONCE, 512
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type, settings.kv_unified = int(flash), False
        self.context = lib.llama_init_from_model(self.model, settings)
        assert self.context, f"llama.cpp has no room for {sequences} x {each} tokens"
        self.batch = lib.llama_batch_init(_AT_ONCE, 0, 1)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        told: Callable[[], None] = lambda: None,
        *,
        again: bool = False,
    ) -> list[list[int]]:
        """The likeliest `new` tokens after each prompt, end tokens not heeded.

        Args:
            told: called after each pass.
            again: the prompts are those of the call before, and read but for their last tokens.
        """
        memory = self.lib.llama_get_memory(self.context)
        last = [len(prompt) - 1 for prompt in prompts]
        if again:
            for row, at in enumerate(last):
                self.lib.llama_memory_seq_rm(memory, row, at, -1)
        else:
            self.lib.llama_memory_clear(memory, False)
        given = [
            (row, at, token, at == last[row])
            for row, prompt in enumerate(prompts)
            for at, token in enumerate(prompt)
            if not again or at == last[row]
        ]
        chosen: list[int] = []
        for start in range(0, len(given), _AT_ONCE):
            chosen += self._pass(given[start : start + _AT_ONCE])
        told()
        written = [[token] for token in chosen]
        for step in range(1, new):
            chosen = self._pass(
                [(row, last[row] + step, token, True) for row, token in enumerate(chosen)],
            )
            for row, token in zip(written, chosen, strict=True):
                row.append(token)
            told()
        return written

    def _pass(self, tokens: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run (sequence, position, token, is asked) through the model; the likeliest token after each that is asked."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (row, at, token, asked) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, at, asked
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        failed = self.lib.llama_decode(self.context, batch)
        assert not failed, f"llama_decode gives {failed}"
        rows = sum(asked for *_, asked in tokens)
        if not rows:
            return []
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits(self.context), (rows, self.vocab))
        return logits.argmax(1).tolist()

    def close(self) -> None:
        """Free what it holds."""
        self.lib.llama_batch_free(self.batch)
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


@contextmanager
def fastest(
    lib: ModuleType, file: Path, prompts: Sequence[Sequence[int]], new: int, threads: int
) -> Iterator[tuple[LlamaCpp, str]]:
    """llama.cpp with or without flash attention, whichever is faster on these prompts; and which it is, in words."""

    @contextmanager
    def loaded(flash: bool) -> Iterator[LlamaCpp]:
        room = max(map(len, prompts)) + new
        peer = LlamaCpp(lib, file, len(prompts), room, threads, flash=flash)
        try:
            yield peer
        finally:
            peer.close()

    tried = {}
    begun = [prompt[:_TRIED] for prompt in prompts]
    for flash in (False, True):
        with loaded(flash) as peer:
            peer.generate(begun, 2)
            tried[flash] = timed(lambda peer=peer: peer.generate(begun, min(new, 16)))  # type: ignore[misc]
    chosen = tried[True] < tried[False]
    with loaded(chosen) as peer:
        yield peer, "flash attention" if chosen else "no flash attention"


_kept: list[Any] = []  # what C code calls must not be collected


def _silent(lib: ModuleType) -> Any:
    """A log of llama.cpp's that says nothing."""
    if not _kept:
        _kept.append(lib.llama_log_callback(lambda *_: None))
    return _kept[0]
