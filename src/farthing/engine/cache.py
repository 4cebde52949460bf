"""The paged key/value cache: pages of a few tokens, shared between sequences with the same prefix.

Paging follows Kwon et al., arXiv:2309.06180. A full prompt page is looked up by its tokens and the page before it, so
the samples of a prompt, and prompts with the same beginning, store and compute it once. Latent attention stores one
entry per token, the latent and the rotated key, instead of every head's keys and values.

Shapes: B sequences, M pages per sequence, S tokens per page, N new tokens (of one sequence, or of all of them flat), G
key/value heads, D head width, T = M * S, H query heads, K experts per token, L latent, R rotated width, W = L + R.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from farthing.model import ModelConfig
from farthing.model.attention import sequence_attention
from farthing.model.kernels.attention import attention
from farthing.model.latent import LatentAttention


class PagedCache:
    """Keys and values of every layer in `pages` reference-counted pages of `page_size` tokens.

    Args:
        modules: number of prediction modules; each gets a layer after the decoder's.
        routing: also store the experts each token was routed to.
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
    ) -> None:
        heads, width = (1, config.mla.cache_dim) if config.mla else (config.num_kv_heads, config.head_dim)
        layers = config.num_layers + modules

        def store() -> list[Tensor]:
            shape = (pages, page_size, heads, width)
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

        self.page_size = page_size
        self.keys = store()
        self.values = [] if config.mla else store()
        self.routes: Tensor | None = None
        if routing and config.moe and config.moe_layers:
            index_dtype = torch.uint8 if config.moe.experts <= 256 else torch.int16
            shape = (pages, page_size, len(config.moe_layers), config.moe.top_k)
            self.routes = torch.zeros(shape, dtype=index_dtype, device=device)
        self.users = [0] * pages
        self._free = list(range(pages - 1, -1, -1))
        # Cached prefixes, least recently used first: (name of the previous page, tokens) -> (page, its name). Names
        # are never reused, so a chain cannot lead through an evicted page.
        self._prefixes: OrderedDict[tuple[int, tuple[int, ...]], tuple[int, int]] = OrderedDict()
        self._remembered: set[int] = set()
        self._names = itertools.count(1)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers."""
        return sum(store[0, 0].nbytes for store in (*self.keys, *self.values))

    @property
    def available(self) -> int:
        """Number of pages that `take` can allocate: free ones and unused cached prefixes."""
        return len(self._free) + sum(self.users[page] == 0 for page in self._remembered)

    def take(self, count: int) -> list[int]:
        """Allocate `count` pages; evicts unused prefixes, least recently used first, when no page is free."""
        while len(self._free) < count:
            key = next(key for key, (page, _) in self._prefixes.items() if self.users[page] == 0)
            page, _ = self._prefixes.pop(key)
            self._remembered.discard(page)
            self._free.append(page)
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.users[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one use of each page; an unused page becomes free unless it is a cached prefix."""
        for page in pages:
            self.users[page] -= 1
            assert self.users[page] >= 0
            if self.users[page] == 0 and page not in self._remembered:
                self._free.append(page)

    def _chunks(self, ids: Sequence[int]) -> list[tuple[int, ...]]:
        size = self.page_size
        return [tuple(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]

    def find_prefix(self, ids: Sequence[int]) -> list[int]:
        """Return the pages that already hold the beginning of ids, each with one more use; leaves at least one token to
        compute."""
        pages: list[int] = []
        name = 0
        for chunk in self._chunks(ids[: len(ids) - 1]):
            if (name, chunk) not in self._prefixes:
                break
            self._prefixes.move_to_end((name, chunk))
            page, name = self._prefixes[name, chunk]
            self.users[page] += 1
            pages.append(page)
        return pages

    def remember(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Register the full pages of a computed prompt for `find_prefix`."""
        name = 0
        for chunk, page in zip(self._chunks(ids), pages, strict=False):
            if (name, chunk) not in self._prefixes:
                self._prefixes[name, chunk] = (page, next(self._names))
                self._remembered.add(page)
            name = self._prefixes[name, chunk][1]

    def forget(self) -> None:
        """Drop all cached prefixes; their keys are stale once the weights change."""
        self._free += [page for page in self._remembered if self.users[page] == 0]
        self._remembered.clear()
        self._prefixes.clear()

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
        for stores, entry in zip((self.keys, self.values), entries, strict=False):
            stores[layer].flatten(0, 1).index_copy_(0, slots_N, entry)


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
        self.pairs = sum(at + 1 for row in positions for at in row)
        pages = max(map(max, positions)) // size + 1
        table = torch.tensor([list(t[:pages]) + [0] * (pages - len(t)) for t in tables], device=device)
        at_BN = torch.tensor([list(row) for row in positions], device=device)
        self.positions = at_BN.flatten()
        self.slots = (table.gather(1, at_BN // size) * size + at_BN % size).flatten()
        self.pages_BM = table.flatten()
        self.shape = (len(tables), pages * size)
        # every layer gathers its pages into the same two buffers, which stay in the processor's cache
        self.gathered = [
            cache.keys[0].new_empty((len(self.pages_BM), *cache.keys[0].shape[1:]))
            for _ in range(2 if cache.values else 1)
        ]
        self.mask = None
        if min(map(min, positions)) + 1 < self.shape[1]:
            hidden_BNT = torch.arange(self.shape[1], device=device) > at_BN[..., None]
            # additive, built once per step: a boolean mask would be converted in every layer
            mask = torch.zeros(hidden_BNT.shape, dtype=cache.keys[0].dtype, device=device)
            self.mask = mask.masked_fill_(hidden_BNT, -torch.inf)[:, None]

    def _rows_mask(self, heads: int) -> Tensor | None:
        """Return the mask of the product's rows, [B, 1, N * heads, T]: each token's row repeated `heads` times."""
        if self.mask is None or self.mask.shape[2] == 1:
            return self.mask
        rows = len(self.slots) // self.shape[0] * heads
        if self.mask.shape[2] < rows:  # the first layer expands it for all
            self.mask = self.mask.repeat_interleave(heads, 2)
        return self.mask

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        (batch, _), (groups, width) = self.shape, k_NGD.shape[1:]
        self.cache._write(layer, self.slots, k_NGD, v_NGD)
        k, v = (
            torch.index_select(store, 0, self.pages_BM, out=buffer)
            .view(*self.shape, groups, width)
            .transpose(1, 2)
            for store, buffer in zip(
                (self.cache.keys[layer], self.cache.values[layer]), self.gathered, strict=True
            )
        )
        heads = q_NHD.shape[1] // groups
        q = q_NHD.view(batch, -1, groups, heads, width).transpose(1, 2)
        out = attention(q.flatten(2, 3), k, v, self._rows_mask(heads))
        return out.view(q.shape).transpose(1, 2).reshape(q_NHD.shape)

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Absorbed form: all heads attend to the latents, which serve as keys and values."""
        store, heads = self.cache.keys[attention.layer], q_NHD.shape[1]
        self.cache._write(attention.layer, self.slots, torch.cat([c_NL, r_NR], -1)[:, None])
        torch.index_select(store, 0, self.pages_BM, out=self.gathered[0])
        entries_BTW = self.gathered[0].view(*self.shape, -1)
        queries = attention.absorb(q_NHD).view(self.shape[0], -1, entries_BTW.shape[-1])
        scores = torch.bmm(queries, entries_BTW.transpose(1, 2)) * q_NHD.shape[-1] ** -0.5
        if (mask := self._rows_mask(heads)) is not None:
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
        self.pairs = sum(end * (end + 1) - start * (start + 1) for start, end in spans) // 2
        self.tables = [torch.tensor(list(t), device=device) for t in tables]
        self.positions = torch.cat([torch.arange(start, end, device=device) for start, end in spans])
        self.slots = torch.cat(
            [
                table[torch.arange(start, end, device=device) // size] * size
                + torch.arange(start, end, device=device) % size
                for table, (start, end) in zip(self.tables, spans, strict=True)
            ]
        )

    def __call__(self, layer: int, q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor) -> Tensor:
        self.cache._write(layer, self.slots, k_NGD, v_NGD)

        def cached(table: Tensor, end: int) -> tuple[Tensor, Tensor]:
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            return keys[table].flatten(0, 1)[:end], values[table].flatten(0, 1)[:end]

        return self._attend(q_NHD, k_NGD, v_NGD, cached)

    def latent(self, attention: LatentAttention, q_NHD: Tensor, c_NL: Tensor, r_NR: Tensor) -> Tensor:
        """Expanded form, over the new latents and those already in the cache."""
        self.cache._write(attention.layer, self.slots, torch.cat([c_NL, r_NR], -1)[:, None])

        def cached(table: Tensor, end: int) -> tuple[Tensor, Tensor]:
            entries = self.cache.keys[attention.layer][table].flatten(0, 2)[:end]
            return attention.expand(*entries.split([c_NL.shape[-1], r_NR.shape[-1]], -1))

        return self._attend(q_NHD, *attention.expand(c_NL, r_NR), cached)

    def _attend(
        self,
        q_NHD: Tensor,
        k_NGD: Tensor,
        v_NGE: Tensor,
        cached: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """Attend within each span; `cached(table, end)` returns a sequence's keys and values before `end`."""
        outs, at = [], 0
        for table, (start, end) in zip(self.tables, self.spans, strict=True):
            new = end - start
            q, k, v = (t[at : at + new] for t in (q_NHD, k_NGD, v_NGE))
            mask = None
            if start:
                k, v = cached(table, end)
                mask = torch.ones(new, end, dtype=torch.bool, device=q.device).tril(diagonal=start)
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            outs.append(sequence_attention(q, k, v, mask).transpose(0, 1))
            at += new
        return torch.cat(outs)
