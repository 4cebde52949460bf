"""The parts of a network as operations of the compiled step, in the order of `Decoder.hidden`.

Shapes: R rows (new tokens), H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor

from farthing.engine.builder import Builder, places_of_both, places_of_heads, side_by_side
from farthing.model.attention import GroupedQueryAttention
from farthing.model.decoder import Layer
from farthing.model.feedforward import GeGLU, SwiGLU
from farthing.model.kernels.native.codes import Code
from farthing.model.kernels.native.operations import Operations, Rows, padded, spread
from farthing.model.kernels.native.packing import Weight
from farthing.model.kernels.native.sizes import ADD, GELU, HEADS, LANES, SILU
from farthing.model.latent import LatentAttention
from farthing.model.layers import Linear, RMSNorm
from farthing.model.moe import Experts, MixtureOfExperts
from farthing.model.mtp import MultiTokenPredictor


class Network(Builder):
    """Makes the operations of a network, of its prediction modules and of its head; arguments as `Builder`'s."""

    _head: Weight | None = None

    def network(self, out: Operations, each: int) -> None:
        """From ids to the final norm's output, `hidden`; `each` new tokens of every sequence."""
        self.embed(out, self.x)
        for number, layer in enumerate(self.decoder.layers):
            self.layer(out, cast(Layer, layer), number, each)
        self.norm(out, self.decoder.norm, self.x, self.hidden)

    def head(self, out: Operations) -> None:
        """From `hidden` to a token for each row."""
        if self._head is None:
            self._head = self.linear(self.decoder.head, kind=1 if len(self.kinds) > 2 else 0)
        self.product(out, self._head, self.hidden, self.logits, bias=self.bias(self.decoder.head))
        width = self.logits.pitch // 4
        if (bound := self.config.logit_softcap) is not None:
            out.add(Code.CAP, x=self.logits.at(), pitch=self.logits.pitch, width=width, bound=float(bound))
        out.add(
            Code.DRAW,
            logits=self.logits.at(),
            pitch=self.logits.pitch,
            entries=self.config.vocab_size,
            padded=width,
        )
        self.quantized = None

    def module(self, out: Operations, depth: int, given: Rows, target: Rows, each: int) -> None:
        """Prediction module `depth`, from ids and the rows of `given` to `target` (see `model.mtp`)."""
        module = cast(MultiTokenPredictor, self.decoder.mtp[depth])
        hidden = self.config.hidden_size
        second = padded(hidden)
        both = self.scratch("both", 2 * second)
        self.embed(out, self.x)
        self.norm(out, module.embedding_norm, self.x, both)
        self.norm(out, module.hidden_norm, given, both, target_at=second)
        weight = self.linear(module.join, ins=places_of_both(hidden))
        self.product(out, weight, both, self.x, bias=self.bias(module.join))
        self.layer(out, cast(Layer, module.layer), self.config.num_layers + depth, each)
        self.norm(out, module.norm, self.x, target)

    def layer(self, out: Operations, layer: Layer, number: int, each: int) -> None:
        """Attention and feed-forward, each added to the residual stream."""
        attention = layer.attention
        source = self._before(out, layer.attention_norm)
        if isinstance(attention, LatentAttention):
            heads = self.latent(out, attention, source, number, each)
        else:
            heads = self.grouped(out, attention, source, number, each)
        self._after(out, attention.o, places_of_heads(attention), heads, layer.attention_out_norm)
        source = self._before(out, layer.feedforward_norm)
        if isinstance(layer.feedforward, MixtureOfExperts):
            assert layer.feedforward_out_norm is None
            self.mixture(out, layer.feedforward, source, number)
        else:
            inner = self.gated(out, layer.feedforward, source)
            self._after(out, layer.feedforward.down, None, inner, layer.feedforward_out_norm)

    def _before(self, out: Operations, norm: torch.nn.Module) -> Rows:
        if not isinstance(norm, RMSNorm):
            return self.x
        self.norm(out, norm, self.x, self.normed)
        return self.normed

    def _after(
        self, out: Operations, last: Linear, ins: np.ndarray | None, x: Rows, norm: RMSNorm | None
    ) -> None:
        """The last product of a half, added to the stream, through a norm if there is one."""
        weight, bias = self.linear(last, ins=ins), self.bias(last)
        if norm is None:
            self.product(out, weight, x, self.x, bias=bias, mode=ADD)
        else:
            self.product(out, weight, x, self.halves, bias=bias)
            self.norm(out, norm, self.halves, self.x, plus=self.x)

    def grouped(
        self, out: Operations, attention: GroupedQueryAttention, x: Rows, number: int, each: int
    ) -> Rows:
        """Grouped-query attention; returns the heads' outputs."""
        heads, groups, width = attention.heads, attention.kv_heads, attention.head_dim
        wide = padded(width, LANES)
        outs = spread(heads + 2 * groups, width, wide)
        qkv = self.scratch("qkv", padded(len(outs)))
        weight = self.linear(attention.qkv, outs=outs)
        self.product(out, weight, x, qkv, bias=self.bias(attention.qkv, outs))
        for norm, count, first in ((attention.q_norm, heads, 0), (attention.k_norm, groups, heads * wide)):
            if norm is None:
                continue
            if self.config.qk_norm == "head":
                self.norm(out, norm, qkv, qkv, x_at=first, target_at=first, groups=count, step=wide)
            else:
                places = spread(count, width, wide)
                self.norm(out, norm, qkv, qkv, x_at=first, target_at=first, places=places)
        keys, values = self.cache.keys[number], self.cache.values[number]
        store = {"keys": keys.data_ptr(), "values": values.data_ptr(), "stored": keys.element_size()}
        out.add(
            Code.ROTATE,
            x=qkv.at(),
            pitch=qkv.pitch,
            heads=heads,
            groups=groups,
            width=width,
            padded=wide,
            **self.rotation(number),
            **store,
        )
        result = self.scratch("heads", padded(heads * wide))
        sinks = attention.sinks
        out.add(
            Code.ATTEND,
            q=qkv.at(),
            q_pitch=qkv.pitch,
            groups=groups,
            shared=heads // groups,
            latent=False,
            width=wide,
            q_step=4 * wide,
            page_bytes=keys[0].nbytes,
            value_width=width,
            window=attention.window or 0,
            softcap=float(attention.softcap or 0.0),
            sinks=self.packer.vector(lambda: sinks) if sinks is not None else 0,
            scale=float(attention.query_scale * width**-0.5),
            **self.attended(width, result, each),
            **store,
        )
        self.quantized = None
        return result

    def latent(self, out: Operations, attention: LatentAttention, x: Rows, number: int, each: int) -> Rows:
        """Latent attention in its absorbed form (see `model.latent`)."""
        mla, heads = attention.widths, attention.heads
        latent, rope = mla.kv_lora_rank, mla.rope_dim
        parts = (attention.qkv_a.parts[0], latent, rope)
        outs = np.concatenate(
            [
                np.pad(np.arange(sum(parts[:i]), sum(parts[: i + 1])), (0, -n % LANES), constant_values=-1)
                for i, n in enumerate(parts)
            ]
        )
        latent_at = padded(parts[0], LANES)
        key_at = latent_at + padded(latent, LANES)
        qkv = self.scratch("qkv_a", padded(len(outs)))
        weight = self.linear(attention.qkv_a, outs=outs)
        self.product(out, weight, x, qkv, bias=self.bias(attention.qkv_a, outs))
        q = qkv
        if attention.q_norm is not None and attention.q_b is not None:
            self.norm(out, attention.q_norm, qkv, qkv)
            q = self.scratch("q_b", padded(heads * mla.qk_dim))
            self.product(out, self.linear(attention.q_b), qkv, q, bias=self.bias(attention.q_b))
        self.norm(out, attention.kv_norm, qkv, qkv, x_at=latent_at, target_at=latent_at)

        # the key projection, applied to the queries of each head; like the value projection it is never quantized
        kv_b, unquantized = attention.kv_b, len(self.kinds) - 1
        of_head = (mla.nope_dim + mla.v_dim) * latent  # elements

        def up() -> Tensor:
            return kv_b.merged().contiguous()

        firsts = [head * of_head for head in range(heads)]
        weight = self.packer.weight(
            up, np.arange(latent), np.arange(mla.nope_dim) * latent, unquantized, firsts
        )
        step = padded(latent + rope)
        absorbed = self.scratch("absorbed", heads * step)
        self.product(out, weight, q, absorbed, x_step=mla.qk_dim, y_step=step)
        entries = self.cache.keys[number]
        stored, entry_width = entries.element_size(), entries.shape[-1]
        out.add(
            Code.ROTATE_LATENT,
            q=q.at(mla.nope_dim),
            q_pitch=q.pitch,
            q_step=4 * mla.qk_dim,
            heads=heads,
            width=rope,
            **self.rotation(number),
            absorbed=absorbed.at(latent),
            absorbed_pitch=absorbed.pitch,
            absorbed_step=4 * step,
            latent=qkv.at(latent_at),
            key=qkv.at(key_at),
            kv_pitch=qkv.pitch,
            latent_width=latent,
            entries=entries.data_ptr(),
            entry_width=entry_width,
            stored=stored,
        )
        wide, shared = padded(latent, LANES), math.gcd(heads, HEADS)
        summed = self.scratch("latents", padded(heads * wide))
        out.add(
            Code.ATTEND,
            q=absorbed.at(),
            q_pitch=absorbed.pitch,
            groups=heads // shared,
            shared=shared,
            latent=True,
            width=entry_width,
            q_step=4 * step,
            keys=entries.data_ptr(),
            values=0,
            page_bytes=entries[0].nbytes,
            value_width=latent,
            stored=stored,
            window=0,
            softcap=0.0,
            sinks=0,
            scale=float(attention.score_scale * mla.qk_dim**-0.5),
            **self.attended(latent, summed, each),
        )
        firsts = [head * of_head + mla.nope_dim * latent for head in range(heads)]
        weight = self.packer.weight(up, np.arange(mla.v_dim) * latent, np.arange(latent), unquantized, firsts)
        value_step = padded(mla.v_dim)
        result = self.scratch("values", padded(heads * value_step))
        self.product(out, weight, summed, result, x_step=wide, y_step=value_step)
        self.quantized = None
        return result

    def gated(self, out: Operations, half: SwiGLU, x: Rows) -> Rows:
        """The gated inner product of a feed-forward half."""
        outs = side_by_side(half.gate_up.parts[0])
        result = self.scratch("inner", padded(half.gate_up.parts[0]))
        weight = self.linear(half.gate_up, outs=outs)
        mode = GELU if isinstance(half, GeGLU) else SILU
        self.product(out, weight, x, result, bias=self.bias(half.gate_up, outs), mode=mode)
        return result

    def mixture(self, out: Operations, mixture: MixtureOfExperts, x: Rows, number: int) -> None:
        """Routed and shared experts, added to the stream."""
        router, experts = mixture.router, cast(Experts, mixture.experts)
        moe, hidden, inner = router.moe, self.config.hidden_size, router.moe.expert_size
        scores = self.scratch("scores", padded(moe.experts))
        ins = np.arange(hidden)
        weight = self.packer.weight(
            lambda: router.weight.contiguous(), np.arange(moe.experts) * hidden, ins, len(self.kinds) - 1
        )
        self.product(out, weight, x, scores)
        self.chosen[number] = chosen = torch.zeros(self.rows, moe.top_k, dtype=torch.int64)
        gates = self.keep(torch.zeros(self.rows, moe.top_k))
        members = torch.zeros(moe.experts + 2, dtype=torch.int64)
        members[0] = self.keep(torch.zeros(self.rows * moe.top_k, dtype=torch.int64))  # places
        members_at = self.keep(members) + 8
        out.add(
            Code.ROUTE,
            logits=scores.at(),
            pitch=scores.pitch,
            experts=moe.experts,
            top_k=moe.top_k,
            groups=moe.groups,
            top_groups=moe.top_groups,
            softmax=moe.scoring == "softmax",
            normalise=moe.normalise,
            scale=float(moe.scale),
            logit_bias=self._vector_or_0(router.logit_bias),
            bias=self._vector_or_0(router.bias),
            chosen=chosen.data_ptr(),
            gates=gates,
        )
        out.add(
            Code.ASSIGN, chosen=chosen.data_ptr(), experts=moe.experts, top_k=moe.top_k, members=members_at
        )
        outs = np.where((rows := side_by_side(inner)) < 0, -1, rows * hidden)
        firsts = [expert * 2 * inner * hidden for expert in range(moe.experts)]
        up = self.packer.weight(lambda: experts.gate_up.contiguous(), outs, ins, 0, firsts)
        middle = self.scratch("experts", padded(inner), self.rows * moe.top_k)
        address, pitch = self.operand(out, up, x)
        out.add(
            Code.EXPERTS_UP,
            **up.fields,
            x=address,
            x_pitch=pitch,
            top_k=moe.top_k,
            grain=max(1, up.tiles // 4),
            members=members_at,
            y=middle.at(),
            y_pitch=middle.pitch,
            experts=moe.experts,
        )
        shared = self.gated(out, mixture.shared, x) if mixture.shared is not None else None
        firsts = [expert * hidden * inner for expert in range(moe.experts)]
        outs = np.arange(hidden) * inner
        down = self.packer.weight(lambda: experts.down.contiguous(), outs, np.arange(inner), 0, firsts)
        self.quantized = None
        address, pitch = self.operand(out, down, middle, repeats=moe.top_k)
        self.quantized = None
        out.add(
            Code.EXPERTS_DOWN,
            **down.fields,
            x=address,
            x_pitch=pitch,
            top_k=moe.top_k,
            experts=moe.experts,
            members=members_at,
            gates=gates,
            y=self.x.at(),
            y_pitch=self.x.pitch,
        )
        if mixture.shared is not None and shared is not None:
            self._after(out, mixture.shared.down, None, shared, None)

    def _vector_or_0(self, parameter: Tensor | None) -> int:
        return 0 if parameter is None else self.packer.vector(lambda: parameter)
