"""The paged key/value cache: pages of a few tokens, shared between sequences with the same prefix.

Paging follows Kwon et al., arXiv:2309.06180. A full page is looked up by its tokens and the page before it
(`engine.pages`), so the samples of a prompt, and prompts with the same beginning, store and compute it once. Latent
attention stores one entry per token, the latent and the rotated key, instead of every head's keys and values. Layers
with a sliding window keep every position too, but read only the pages that the window reaches.

Shapes: B sequences, M pages per sequence, S tokens per page, N new tokens (of one sequence, or of all of them flat), G
key/value heads, D head width, T = M * S, H query heads, K experts per token, L latent, R rotated width, W = L + R.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from farthing.engine.pages import Pages
from farthing.model import ModelConfig
from farthing.model.attention import mean_pairs
from farthing.model.kernels.attention import FULL, Rule, attention
from farthing.model.kernels.native.sizes import LANES
from farthing.model.kernels.window import causal
from farthing.model.latent import LatentAttention


class Layout:
    """How a page lies in memory: one token after another, [S, G, D], which torch's attention reads.

    Attributes:
        keys, values: shape of a page.
    """

    def __init__(self, page_size: int, heads: int, width: int, latent: bool) -> None:
        self.page_size, self.heads, self.width = page_size, heads, width
        self.keys: tuple[int, ...] = (page_size, heads, width)
        self.values: tuple[int, ...] = self.keys

    def write(self, stores: Sequence[Tensor], slots_N: Tensor, entries: Sequence[Tensor]) -> None:
        """Store keys and values [N, G, D], or latent entries [N, 1, W], in their slots."""
        for store, entry in zip(stores, entries, strict=True):
            store.flatten(0, 1).index_copy_(0, slots_N, entry)

    def read(self, stores: Sequence[Tensor], pages: Tensor) -> list[Tensor]:
        """Return what the pages hold, [pages * S, G, D] each."""
        return [store[pages].flatten(0, 1) for store in stores]


class Tiles(Layout):
    """What compiled attention reads (`model.kernels.native.attend`): keys [G, D, S], values [G, D / 16, S, 16], latent
    entries [S, W], with D and W padded to whole vectors of 16."""

    def __init__(self, page_size: int, heads: int, width: int, latent: bool) -> None:
        super().__init__(page_size, heads, width, latent)
        self.latent, blocks = latent, -(-width // LANES)
        self.keys = (page_size, blocks * LANES) if latent else (heads, blocks * LANES, page_size)
        self.values = (heads, blocks, page_size, LANES)

    def write(self, stores: Sequence[Tensor], slots_N: Tensor, entries: Sequence[Tensor]) -> None:
        page_N, token_N = slots_N // self.page_size, slots_N % self.page_size
        keys = stores[0]
        if self.latent:
            keys[page_N, token_N, : self.width] = entries[0][:, 0].to(keys.dtype)
            return
        values = stores[1]
        keys[page_N, :, : self.width, token_N] = entries[0].to(keys.dtype)
        wide = F.pad(entries[1].to(values.dtype), (0, -self.width % LANES))
        values[page_N, :, :, token_N] = wide.unflatten(-1, (-1, LANES))

    def read(self, stores: Sequence[Tensor], pages: Tensor) -> list[Tensor]:
        if self.latent:
            return [stores[0][pages].flatten(0, 1)[:, None, : self.width]]
        keys = stores[0][pages].permute(0, 3, 1, 2).flatten(0, 1)
        values = stores[1][pages].permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        return [keys[..., : self.width], values[..., : self.width]]


class PagedCache(Pages):
    """Keys and values of every layer in `pages` reference-counted pages of `page_size` tokens.

    Args:
        modules: number of prediction modules; each gets a layer after the decoder's.
        routing: also store the experts each token was routed to.
        layout: how a page lies in memory: see `Layout` and `Tiles`.
    """

    def __init__(
        self,
        config: ModelConfig,
        pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        modules: int = 0,
        routing: bool = False,
        layout: type[Layout] = Layout,
    ) -> None:
        heads, width = (1, config.mla.cache_dim) if config.mla else (config.num_kv_heads, config.head_dim)
        layers = range(config.num_layers + modules)
        super().__init__(pages, page_size)
        self.windows = config.windows
        self.layout = layout(page_size, heads, width, latent=config.mla is not None)

        def store(shape: tuple[int, ...]) -> list[Tensor]:
            return list(_zeros((len(layers), pages, *shape), dtype, device))

        self.keys = store(self.layout.keys)
        self.values = [] if config.mla else store(self.layout.values)
        self.routes: Tensor | None = None
        if routing and config.moe and config.moe_layers:
            index_dtype = torch.uint8 if config.moe.experts <= 256 else torch.int16
            shape = (pages, page_size, len(config.moe_layers), config.moe.top_k)
            self.routes = torch.zeros(shape, dtype=index_dtype, device=device)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(store[0].nbytes for store in (*self.keys, *self.values)) // self.page_size

    def copy_page(self, source: int, target: int) -> None:
        """Copy one page in every layer (sequences that diverge within a page cannot share it)."""
        routes = [] if self.routes is None else [self.routes]
        for tensor in (*self.keys, *self.values, *routes):
            tensor[target] = tensor[source]

    def write_routes(self, slots_N: Tensor, chosen: Mapping[int, Tensor]) -> None:
        """Store the tokens' chosen experts, [N, K] by layer number, in their slots."""
        assert self.routes is not None
        stacked = torch.stack([chosen[layer] for layer in sorted(chosen)], 1)
        self.routes.flatten(0, 1).index_copy_(0, slots_N, stacked.to(self.routes.dtype))

    def read_routes(self, pages: Sequence[int], length: int) -> Tensor:
        """Return the experts of a sequence's first `length` tokens, [length, layers with experts, K]."""
        assert self.routes is not None
        return self.routes[pages].flatten(0, 1)[:length]

    def _write(self, layer: int, slots_N: Tensor, *entries: Tensor) -> None:
        """Store keys and values [N, G, D], or latent entries [N, 1, W], in their slots."""
        stores = [part[layer] for part in (self.keys, self.values) if part]
        self.layout.write(stores, slots_N, entries)

    def read(self, layer: int, pages: Tensor, end: int) -> list[Tensor]:
        """Return a sequence's keys and values before position `end`, [end, G, D] each, or its latent entries [end, 1,
        W]."""
        stores = [part[layer] for part in (self.keys, self.values) if part]
        return [tokens[:end] for tokens in self.layout.read(stores, pages)]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU their memory is taken from the system only as it is written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class _View:
    """The pages that hold what the new tokens of B sequences see in a layer, and the mask of what they do not."""

    def __init__(
        self,
        cache: PagedCache,
        tables: Sequence[Sequence[int]],
        positions: Sequence[Sequence[int]],
        window: int | None = None,
    ) -> None:
        size, device = cache.page_size, cache.keys[0].device
        reach = max(map(max, positions)) + 1 if window is None else window
        firsts = [max(0, min(row) + 1 - reach) // size for row in positions]
        count = max(max(row) // size + 1 - first for row, first in zip(positions, firsts, strict=True))
        rows = [list(t[first : first + count]) for t, first in zip(tables, firsts, strict=True)]
        pages = torch.tensor([row + [0] * (count - len(row)) for row in rows], device=device)
        self.pages_BM = pages.flatten()
        self.shape = (len(tables), count * size)
        # every layer gathers its pages into the same two buffers, which stay in the processor's cache
        self._gathered = [
            cache.keys[0].new_empty((len(self.pages_BM), *cache.keys[0].shape[1:]))
            for _ in range(2 if cache.values else 1)
        ]
        self._mask = None
        if window is not None or min(map(min, positions)) + 1 < self.shape[1]:
            at_BN = torch.tensor([list(row) for row in positions], device=device)
            start_B = torch.tensor(firsts, device=device) * size
            ahead_BNT = (at_BN - start_B[:, None])[..., None] - torch.arange(self.shape[1], device=device)
            hidden_BNT = ahead_BNT < 0 if window is None else (ahead_BNT < 0) | (ahead_BNT >= window)
            # additive, built once per step: a boolean mask would be converted in every layer
            mask = torch.zeros(hidden_BNT.shape, dtype=cache.keys[0].dtype, device=device)
            self._mask = mask.masked_fill_(hidden_BNT, -torch.inf)[:, None]

    def gather(self, *stores: Tensor) -> list[Tensor]:
        """Return what a layer's stores hold for each sequence, [B, T, G, D] each."""
        return [
            torch.index_select(store, 0, self.pages_BM, out=buffer).view(*self.shape, *store.shape[2:])
            for store, buffer in zip(stores, self._gathered, strict=True)
        ]

    def mask(self, rows: int) -> Tensor | None:
        """Return the mask of the product's rows, [B, 1, rows, T]: each token's row repeated for its heads."""
        if self._mask is None or self._mask.shape[2] == 1:
            return self._mask
        if self._mask.shape[2] < rows:  # the first layer expands it for all
            self._mask = self._mask.repeat_interleave(rows // self._mask.shape[2], 2)
        return self._mask


class Decode:
    """An `Attend` for the same number of new tokens in each of B sequences: stores their keys and values and attends
    causally. One token in plain decoding, several when guesses are verified.

    Queries of several heads and tokens that share a key/value head become rows of one small matrix product.

    Args:
        positions: positions of the new tokens in each sequence, [B][N].
    """

    def __init__(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]
    ) -> None:
        size, device = cache.page_size, cache.keys[0].device
        self.cache = cache
        self.pairs = mean_pairs([(at, at + 1) for row in positions for at in row], cache.windows)
        self.positions = torch.tensor([at for row in positions for at in row], device=device)
        slots = [
            t[at // size] * size + at % size for t, row in zip(tables, positions, strict=True) for at in row
        ]
        self.slots = torch.tensor(slots, device=device)
        self._tables, self._at, self._views = tables, positions, dict[int | None, _View]()

    def _view(self, window: int | None = None) -> _View:
        """Return what layers with this window see; made for the first of them."""
        if window is not None and window > max(map(max, self._at)):
            window = None  # it holds everything yet
        if window not in self._views:
            self._views[window] = _View(self.cache, self._tables, self._at, window)
        return self._views[window]

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, rule: Rule = FULL) -> Tensor:
        groups, width = k_NGD.shape[1:]
        self.cache._write(layer, self.slots, k_NGD, v_NGD)
        view = self._view(rule.window)
        k, v = view.gather(self.cache.keys[layer], self.cache.values[layer])
        heads = q_NHD.shape[1] // groups
        q = q_NHD.view(view.shape[0], -1, groups, heads, width).transpose(1, 2)
        mask = view.mask(q.shape[2] * heads)
        if rule.sinks is not None:
            rule = replace(rule, sinks=rule.sinks.view(groups, heads, 1).repeat(1, q.shape[2], 1))
        out = attention(q.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), mask, False, rule)
        return out.view(q.shape).transpose(1, 2).reshape(q_NHD.shape)

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Absorbed form: all heads attend to the latents, which serve as keys and values."""
        view, heads = self._view(), q_NHD.shape[1]
        self.cache._write(attention.layer, self.slots, torch.cat([c_NL, r_NR], -1)[:, None])
        entries_BTW = view.gather(self.cache.keys[attention.layer])[0].squeeze(2)
        queries = attention.absorb(q_NHD).view(view.shape[0], -1, entries_BTW.shape[-1])
        scores = torch.bmm(queries, entries_BTW.transpose(1, 2)) * q_NHD.shape[-1] ** -0.5
        if (mask := view.mask(queries.shape[1])) is not None:
            scores = scores + mask[:, 0]
        weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
        out = torch.bmm(weights, entries_BTW[..., : c_NL.shape[-1]])
        return attention.unabsorb(out.view(len(q_NHD), heads, -1))


class Prefill:
    """An `Attend` for the new tokens of several prompts, each after the part of it that is already cached.

    Args:
        spans: (start, end) of the new tokens in each prompt.
    """

    def __init__(
        self, cache: PagedCache, tables: Sequence[Sequence[int]], spans: Sequence[tuple[int, int]]
    ) -> None:
        size, device = cache.page_size, cache.keys[0].device
        self.cache, self.spans = cache, list(spans)
        self.pairs = mean_pairs(spans, cache.windows)
        self.tables = [torch.tensor(list(t), device=device) for t in tables]
        self.positions = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
        self.slots = torch.cat(
            [
                table[torch.arange(start, end, device=device) // size] * size
                + torch.arange(start, end, device=device) % size
                for table, (start, end) in zip(self.tables, spans, strict=True)
            ]
        )

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, rule: Rule = FULL) -> Tensor:
        self.cache._write(layer, self.slots, k_NGD, v_NGD)

        def cached(table: Tensor, end: int) -> tuple[Tensor, Tensor]:
            k_TGD, v_TGD = self.cache.read(layer, table, end)
            return k_TGD.to(k_NGD.dtype), v_TGD.to(v_NGD.dtype)

        return self._attend(q_NHD, k_NGD, v_NGD, cached, rule)

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Expanded form, over the new latents and those already in the cache."""
        self.cache._write(attention.layer, self.slots, torch.cat([c_NL, r_NR], -1)[:, None])

        def cached(table: Tensor, end: int) -> tuple[Tensor, Tensor]:
            (entries_T1W,) = self.cache.read(attention.layer, table, end)
            entries = entries_T1W[:, 0].to(c_NL.dtype)
            return attention.expand(*entries.split([c_NL.shape[-1], r_NR.shape[-1]], -1))

        return self._attend(q_NHD, *attention.expand(c_NL, r_NR), cached, FULL)

    def _attend(
        self,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGE: Tensor,
        cached: Callable[[Tensor, int], tuple[Tensor, Tensor]],
        rule: Rule,
    ) -> Tensor:
        """Attend within each span; `cached(table, end)` returns a sequence's keys and values before `end`."""
        outs, at = [], 0
        for table, (start, end) in zip(self.tables, self.spans, strict=True):
            new = end - start
            q, k, v = (t[at : at + new] for t in (q_NHD, k_NGD, v_NGE))
            if start:
                k, v = cached(table, end)
            q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
            outs.append(causal(q, k, v, rule)[0].transpose(0, 1))
            at += new
        return torch.cat(outs)
