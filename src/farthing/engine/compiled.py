"""Decoding by the compiled step: the network's operations, their state, and what they read and write.

The engine hands over sequences and gets tokens; everything between is one call into `model.kernels.native`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from farthing.base import processor
from farthing.base.errors import UserError
from farthing.base.sizes import PACKED_BYTES
from farthing.engine.cache import PagedCache
from farthing.engine.network import Network
from farthing.engine.sampling import Chosen, Row, choose
from farthing.model import Decoder
from farthing.model.kernels.native import trial
from farthing.model.kernels.native.codes import Word
from farthing.model.kernels.native.operations import Operations, Rows, padded
from farthing.model.kernels.native.session import Session
from farthing.model.kernels.native.sizes import BLOCK, DOTTED, HEADS, LANES, SPAN, TILE_BYTES
from farthing.model.layers import Linear, Lora
from farthing.model.moe import BoundedExperts

QUANTIZED = {"int8": ("int8", "bfloat16"), "int4": ("int4", "int8", "bfloat16")}


def kinds(decoder: Decoder, quantize: str) -> tuple[str, ...]:
    """Kinds of packed weights: of matrices first, of what stays unquantized last."""
    if quantize != "exact":
        return QUANTIZED[quantize]
    # low-rank updates are added in the network's dtype, whatever the weights are stored in
    updated = any(isinstance(module, Lora) for module in decoder.modules())
    stored = (not updated and decoder.stored) or decoder.embed.weight.dtype
    return ("bfloat16",) if stored == torch.bfloat16 else ("float32",)


def lacks(decoder: Decoder, page_size: int = LANES) -> str:
    """Why a network cannot be compiled here; "" if it can."""
    weight = decoder.embed.weight
    if page_size != LANES:
        return f"pages of {page_size} tokens; compiled attention needs {LANES}"
    if any(isinstance(module, BoundedExperts) for module in decoder.modules()):
        return "gpt-oss's experts have no compiled form"
    if any(parameter.is_inference() for parameter in decoder.parameters()):
        return "weights made in inference mode do not tell when they change"
    tried = trial.KERNEL.status(weight.device, weight.dtype)
    return "" if tried.on else tried.why


def rounds_prompts(decoder: Decoder, quantize: str) -> bool:
    """Whether prompt tokens in a decoding step are multiplied in bfloat16, in about half of a sample's time."""
    return kinds(decoder, quantize)[0] == "bfloat16" and processor.isa() in DOTTED


def require_kernels(decoder: Decoder, quantize: str, page_size: int = LANES) -> None:
    """Raise UserError if a quantized network cannot be compiled here: it has no other form."""
    if why := lacks(decoder, page_size):
        refuse(quantize, why)


def refuse(quantize: str, why: str) -> None:
    """Raise UserError where something quantized cannot be compiled; what is exact has torch's path."""
    if quantize != "exact":
        raise UserError(
            f"quantize: {quantize} needs compiled kernels, and there are none here ({why}); answer with exact weights"
        )


class CompiledNetwork:
    """A decoder's network, compiled for one cache.

    Args:
        sequences: the most of them in a step.
        each: new tokens of each sequence in `decode`; `module_each` in a prediction module's pass.
        positions: the most tokens of a sequence.

    Raises:
        NoKernels: if compiling fails.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: PagedCache,
        *,
        sequences: int,
        each: int,
        module_each: int,
        modules: int,
        positions: int,
        quantize: str,
    ) -> None:
        self.decoder, self.cache = decoder, cache
        if sum(parameter.nbytes for parameter in decoder.parameters()) > PACKED_BYTES:
            for module in decoder.modules():
                if isinstance(module, Linear):
                    module.packs = False
        names = kinds(decoder, quantize)
        rows = sequences * max(each, module_each if modules else 1)
        self._session = Session(names, _scratch_bytes(decoder, rows))
        build = Network(decoder, cache, rows, positions, names, self._session.threads)
        self._build = build
        self._body, self._head = Operations(), Operations()
        build.network(self._body, each)
        build.head(self._head)
        self._network = self._body + self._head
        self._modules = []
        self._module_rows = [build.buffer(build.hidden.pitch // 4) for _ in range(modules + 1)]
        for depth in range(modules):
            operations = Operations()
            given, target = self._module_rows[depth], self._module_rows[depth + 1]
            build.module(operations, depth, given, target, module_each)
            self._modules.append(operations)
        self._state(rows, sequences, positions)
        self._packed_from: tuple[int, ...] = ()
        self._dtype = decoder.embed.weight.dtype

    def _state(self, rows: int, sequences: int, positions: int) -> None:
        """The arrays that a step reads and writes."""
        self.ids, self.positions, self.pages, self.chosen = (np.zeros(rows, np.int64) for _ in range(4))
        self.tables = np.zeros((sequences, -(-positions // LANES) + 1), np.int64)
        self.temperatures, self.uniforms = np.ones(rows, np.float32), np.zeros(rows)
        self.logprobs, self.entropies = np.zeros(rows, np.float32), np.zeros(rows, np.float32)
        for word in (
            *(Word.IDS, Word.POSITIONS, Word.PAGES, Word.TABLES, Word.TEMPERATURES, Word.UNIFORMS),
            *(Word.CHOSEN, Word.LOGPROBS, Word.ENTROPIES),
        ):
            self._session[word] = getattr(self, word.name.lower())
        self._session[Word.TABLE_BYTES] = self.tables.strides[0]

    def refresh(self) -> None:
        """Pack the weights again if they have changed, in place (except through `.data`) or for other tensors.

        Raises:
            UserError: if they have another dtype than before.
        """
        now = tuple(x for p in self.decoder.parameters() for x in (p.data_ptr(), p._version))
        if now == self._packed_from:
            return
        table = self.decoder.embed.weight
        if table.dtype != self._dtype:
            raise UserError(
                "the weights have another dtype than when this engine was made; make a new engine"
            )
        self._session[Word.EMBEDDING] = table.data_ptr()
        operations, sources = self._build.packer.operations()
        self._session.run(operations)
        del sources  # read until here
        self._packed_from = now

    def place(self, tables: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> None:
        """Say which pages each sequence has, and the positions of its new tokens."""
        row = 0
        for number, (table, at) in enumerate(zip(tables, positions, strict=True)):
            reach = max(at) // LANES + 1
            self.tables[number, :reach] = table[:reach]
            for position in at:
                self.positions[row] = position
                self.pages[row] = table[position // LANES]
                row += 1
        longest = int(self.positions[:row].max()) + 1
        self._session[Word.SPANS] = -(-longest // SPAN)

    def decode(self, ids: Sequence[int], draws: Sequence[Row]) -> tuple[Chosen, Tensor]:
        """Run the network over the placed tokens, and choose a token after each of the first ones, as many as `draws`.
        The others are of prompts, and read with products in bfloat16 where the weights are and that is faster.

        Returns:
            The choice, and the final norm's output [R, C] float32, good until the next call.
        """
        rows = len(ids)
        self.ids[:rows] = ids
        if len(draws) == rows:
            chosen = self._choose(self._network, draws)
        else:
            self._session.run(self._body, rows, len(draws))
            chosen = self._choose(self._head, draws)
        return chosen, self._rows(self._build.hidden, rows)

    def module(self, depth: int, ids: Sequence[int], hidden_RC: Tensor) -> Tensor:
        """Run prediction module `depth` over the placed tokens: its output [R, C] float32, good until the next call of
        the same module."""
        rows = len(ids)
        self.ids[:rows] = ids
        self._rows(self._module_rows[depth], rows).copy_(hidden_RC)
        self._session.run(self._modules[depth], rows)
        return self._rows(self._module_rows[depth + 1], rows)

    def choose(self, hidden_RC: Tensor, draws: Sequence[Row]) -> Chosen:
        """Choose a token from each row of a final norm's output."""
        self._rows(self._build.hidden, len(hidden_RC)).copy_(hidden_RC)
        return self._choose(self._head, draws)

    def _choose(self, operations: Operations, draws: Sequence[Row]) -> Chosen:
        rows = len(draws)
        self.uniforms[:rows] = [row.uniform for row in draws]
        self.temperatures[:rows] = [row.sampling.temperature for row in draws]
        torchs = [number for number, row in enumerate(draws) if not row.plain]
        self.temperatures[torchs] = -1.0  # leaves the logits
        self._session.run(operations, rows)
        chosen = Chosen(
            self.chosen[:rows].tolist(),
            self.logprobs[:rows].tolist(),
            self.entropies[:rows].tolist(),
            [[] for _ in draws],
        )
        if torchs:
            logits = self._build.logits.first(rows, self.decoder.config.vocab_size)[torchs]
            chosen.put(torchs, choose(logits, [draws[number] for number in torchs]))
        return chosen

    def _rows(self, rows: Rows, count: int) -> Tensor:
        return rows.first(count, self.decoder.config.hidden_size)

    def slots(self, rows: int) -> Tensor:
        """Slots of the cache of the last step's rows, [R]."""
        return torch.from_numpy(self.pages[:rows] * LANES + self.positions[:rows] % LANES)

    def routes(self, rows: int) -> dict[int, Tensor]:
        """The experts chosen for each row of the last step, [R, K] by layer."""
        return {
            layer: chosen[:rows]
            for layer, chosen in self._build.chosen.items()
            if layer < self.decoder.config.num_layers
        }


def _scratch_bytes(decoder: Decoder, rows: int) -> int:
    """The most that an operation needs of a thread's scratch."""
    config = decoder.config
    top_k, experts = (config.moe.top_k, config.moe.experts) if config.moe else (1, 0)
    tile = (rows * top_k + LANES) * (8 + TILE_BYTES)  # rows' addresses, and their sums
    widest = max(padded(m.in_features) for m in decoder.modules() if isinstance(m, Linear))
    tile += (rows + LANES) * 8 + 64 + 2 * rows * widest  # and the rows in bfloat16
    scores = 4 * HEADS * SPAN
    drawn = 4 * BLOCK + 8 * (config.vocab_size // BLOCK + 2)
    return max(tile, scores, drawn, 16 * (experts + 2))
