"""Layouts of a training run over devices: every sensible one, what it needs, and which is fastest.

A layout splits the matrices over `tensor` devices of a node, the layers over `pipeline` stages (to train from nothing)
and the experts over `expert` devices; what is left of the devices works on different data, and shares the optimizer's
states (ZeRO 1) or parameters and gradients as well (ZeRO 3, FSDP). `candidates` tries all of them with a few
micro-batches and recomputation policies, asks `memory` what a device must hold, and estimates the seconds of
an optimizer step from below:

    compute   FLOPs, recomputation included, at the best measured matrix product of the device
    memory    reading and writing activations, three times over a step
    network   parameters and gradients among the data ranks, tokens to and from experts, partial sums
    step      (max(compute + memory + partial sums, the rest of the network)) / (1 - pipeline bubble)

The traffic is the lower bound of each collective (ring algorithms), and data and expert traffic is taken to
hide behind computing as far as it fits. These seconds rank layouts and say what limits a run; the hours of a
plan come from the fitted `efficiency`, since no lower bound is a prediction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from farthing.cost.devices import Device, peak
from farthing.cost.flops import Recompute, flops_per_token, parameters
from farthing.cost.memory import (
    WIDTH,
    Bits,
    Code,
    Layout,
    Memory,
    Optimizer,
    Precision,
    cache_bytes_per_token,
    memory,
)
from farthing.cost.shapes import Shapes, shapes
from farthing.plans.efficiency import NODE

BETWEEN_NODES = 50e9
"""Bytes a second and device, one way: 400 Gbit/s InfiniBand (DeepSeek-V3, arXiv:2412.19437 section 3.2.2)."""
USABLE = 0.95  # of a device's memory; the rest is fragments
FP8_SPEEDUP = 1.28  # a whole step, torchtitan's FP8 over its BF16 (published_runs.csv)
_UNKNOWN_LINK = 32e9  # PCIe 4, where the catalogue has no link
_KERNEL = 0.8  # of peak, where no matrix product was measured
_PASSES = 3  # over the activations: written, read by the backward pass, gradients alike
Limit = Literal["compute", "memory", "network"]


@dataclass(frozen=True)
class Training:
    """What is trained and how, as far as a layout does not choose it; most are arguments of `cost.memory.memory`."""

    code: Code = "usual"
    """Whose trainer; Farthing's own computes no layer again."""
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    lora_rank: int = 0
    base_bits: Bits = 16
    reference: bool = False
    fused_loss: bool = False
    offload: bool = False
    from_nothing: bool = True
    """Pretraining, for which pipelines are tried too."""
    rows: int = 1
    """Sequences of an example: two that are compared, or one."""
    teacher: Mapping[str, Any] | None = None
    """config.json of a frozen model whose logits are learned."""
    sampled: int = 0
    """Tokens of the longest sequence that it samples itself; 0 if it samples none."""

    def memory(
        self, config: Mapping[str, Any], examples: int, seq_len: int, recompute: Recompute, layout: Layout
    ) -> Memory:
        """Of the fullest device, with `examples` in a pass of a data rank.

        A trainer that samples does one thing at a time: its figure is the larger of training's, and of the states
        beside the sampler's whole weights and the cache of one sequence.
        """
        tokens = examples * self.rows * seq_len
        found = memory(
            config,
            kind="lora" if self.lora_rank else "pretrain" if self.from_nothing else "sft",
            micro_tokens=tokens,
            seq_len=seq_len,
            precision=self.precision,
            optimizer=self.optimizer,
            recompute=recompute,
            layout=layout,
            code=self.code,
            lora_rank=self.lora_rank,
            base_bits=self.base_bits,
            reference=self.reference,
            fused_loss=self.fused_loss,
            offload=self.offload,
        )
        b = WIDTH[self.precision]
        if self.teacher is not None:  # its weights, its logits and their log-softmax in float32
            held = memory(
                self.teacher, kind="serve", micro_tokens=tokens, seq_len=seq_len, precision=self.precision,
                layout=layout,
            )  # fmt: skip
            numbers = tokens * shapes(config).vocab / layout.tensor
            found = replace(
                found,
                weights=found.weights + held.weights,
                logits=found.logits + int(numbers * (b + 4)),
            )
        if not self.sampled:
            return found
        cache = self.sampled * cache_bytes_per_token(config, self.precision) // layout.tensor
        sampler = int(b * parameters(config).total / layout.tensor)
        sampling = replace(found, weights=found.weights + sampler, activations=0, logits=0, cache=cache)
        return max(found, sampling, key=lambda each: each.total)


PRETRAINING = Training()


@dataclass(frozen=True)
class Candidate:
    """One layout of a run. Seconds are lower bounds for one optimizer step."""

    layout: Layout
    micro_batch: int
    """Sequences that a data rank works on at a time."""
    recompute: Recompute
    held: Memory
    """On the fullest device."""
    compute: float
    memory: float
    network: float
    bubble: float
    """Share of the step that pipeline stages spend waiting."""
    step: float

    @cached_property
    def memory_bytes(self) -> int:
        """On the fullest device."""
        return self.held.total

    @property
    def limited_by(self) -> Limit:
        parts: dict[Limit, float] = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return max(parts, key=lambda part: parts[part])

    def as_json(self) -> dict[str, Any]:
        return {
            "data": self.layout.data,
            "expert": self.layout.expert,
            "tensor": self.layout.tensor,
            "pipeline": self.layout.pipeline,
            "micro_batch": self.micro_batch,
            "recompute": self.recompute,
            "zero": self.layout.zero,
        }

    def __str__(self) -> str:
        said = [f"data {self.layout.data}"]
        for word in ("expert", "tensor", "pipeline"):
            if getattr(self.layout, word) > 1:
                said.append(f"{word} {getattr(self.layout, word)}")
        said += [f"micro-batch {self.micro_batch}", f"recompute {self.recompute}", f"ZeRO {self.layout.zero}"]
        return ", ".join(said)


def best(
    config: Mapping[str, Any],
    device: Device,
    count: int,
    seq_len: int,
    batch_tokens: float,
    training: Training = PRETRAINING,
) -> tuple[list[Candidate], Candidate]:
    """Layouts that fit, fastest first, and the one that needs least memory, fitting or not.

    Of layouts within 2% of the fastest the plainest comes first: fewest ways of splitting, least recomputed.
    """
    room = device.memory_bytes * USABLE
    found = list(candidates(config, device, count, seq_len, batch_tokens, training))
    least = min(found, key=lambda c: c.memory_bytes)
    fitting = sorted((c for c in found if c.memory_bytes <= room), key=lambda c: c.step)
    if fitting:
        close = [c for c in fitting if c.step <= 1.02 * fitting[0].step]
        plainest = min(close, key=_pieces)
        fitting.remove(plainest)
        fitting.insert(0, plainest)
    return fitting, least


def candidates(
    config: Mapping[str, Any],
    device: Device,
    count: int,
    seq_len: int,
    batch_tokens: float,
    training: Training = PRETRAINING,
) -> Iterator[Candidate]:
    """Every layout that divides `count` devices, the model and the batch."""
    s = shapes(config)
    rows = max(1, round(batch_tokens / seq_len / training.rows))
    policies = _RECOMPUTE if training.code == "usual" else _RECOMPUTE[:1]
    work = {policy: flops_per_token(config, seq_len, recompute=policy).hardware for policy in policies}
    experts = sum(layer.weights("expert") for layer in s.layers)
    rest = sum(layer.parameters for layer in s.layers) - experts + 2 * s.vocab * s.embed
    pipelines = (1, 2, 4, 8, 16, 32) if training.from_nothing else (1,)
    for tensor, pipeline in itertools.product((1, 2, 4, 8), pipelines):
        if count % (tensor * pipeline) or s.heads % tensor or len(s.layers) < 2 * pipeline > 2:
            continue
        if tensor > 1 and (tensor > count or s.width % tensor):
            continue
        data = count // (tensor * pipeline)
        # With a pipeline, ZeRO 3 would all-gather the parameters for every micro-batch.
        for expert, zero, recompute in itertools.product(
            _expert_ways(s, data), (1, 3) if data > 1 and pipeline == 1 else (1,), policies
        ):
            layout = Layout(data=data, expert=expert, tensor=tensor, pipeline=pipeline, zero=zero)
            for micro in (1, 2, 4):
                if micro > 1 and data * micro > rows:
                    break
                found = _candidate(
                    config, s, (experts, rest), device, layout, micro, recompute, seq_len, rows,
                    work[recompute], training,
                )  # fmt: skip
                yield found
                if found.memory_bytes > device.memory_bytes:
                    break


_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "alternate", "full")


def _candidate(
    config: Mapping[str, Any],
    s: Shapes,
    sizes: tuple[int, int],
    device: Device,
    layout: Layout,
    micro: int,
    recompute: Recompute,
    seq_len: int,
    rows: int,
    work: float,
    training: Training,
) -> Candidate:
    needed = training.memory(config, micro, seq_len, recompute, layout)
    turns = max(1, round(rows / (layout.data * micro)))  # micro-batches of a rank in one step
    tokens = turns * micro * training.rows * seq_len
    shared = layout.tensor * layout.pipeline
    speed = device.measured_flops.get("bfloat16", peak(device) * _KERNEL)
    compute = work * tokens / shared / (speed * (FP8_SPEEDUP if training.precision == "fp8" else 1))
    activations = _PASSES * turns * needed.activations / device.bytes_per_second
    link = device.link_bytes_per_second or _UNKNOWN_LINK
    sums = _tensor_traffic(s, layout, tokens, recompute) / link
    spread = _data_traffic(sizes, layout, turns, link) + _expert_traffic(s, layout, tokens, link)
    bubble = (layout.pipeline - 1) / (turns + layout.pipeline - 1)
    return Candidate(
        layout=layout,
        micro_batch=micro,
        recompute=recompute,
        held=needed,
        compute=compute,
        memory=activations,
        network=sums + spread,
        bubble=bubble,
        step=max(compute + activations + sums, spread) / (1 - bubble),
    )


def _expert_ways(s: Shapes, data: int) -> list[int]:
    if not s.experts:
        return [1]
    return [ways for ways in (1, 8, 16, 32, 64) if data % ways == 0 and s.experts % ways == 0]


def _tensor_traffic(s: Shapes, layout: Layout, tokens: float, recompute: Recompute) -> float:
    """Bytes a device sends: each layer sums twice forward and twice backward, over [tokens, width]."""
    t = layout.tensor
    sums = 6 if recompute == "full" else 4
    layers = len(s.layers) / layout.pipeline
    return sums * layers * 2 * tokens * s.width * 2 * (t - 1) / t


def _data_traffic(sizes: tuple[int, int], layout: Layout, turns: int, link: float) -> float:
    """Seconds to exchange parameters and gradients of 2 bytes among the data ranks; `sizes` are the
    parameters in experts and the others.

    ZeRO 1 gathers and reduces once a step; ZeRO 3 gathers twice for every micro-batch. Ranks that share an
    expert are fewer by `expert`.
    """
    if layout.data == 1:
        return 0.0
    size = 2 * (sizes[0] / layout.expert + sizes[1]) / (layout.tensor * layout.pipeline)
    times = 2 * turns + 1 if layout.zero == 3 else 2
    return times * size * (layout.data - 1) / layout.data / _speed(layout.data * layout.tensor, link)


def _expert_traffic(s: Shapes, layout: Layout, tokens: float, link: float) -> float:
    """Seconds of four exchanges a layer: tokens to their experts and back, forward and backward.

    A token is sent once to each node that holds one of its experts, to at most 4 of them, as DeepSeek-V3
    limits it (arXiv:2412.19437 section 2.1.2).
    """
    if layout.expert == 1:
        return 0.0
    nodes = max(1, layout.expert * layout.tensor // NODE)
    copies = min(s.top_k, 4, nodes) if nodes > 1 else s.top_k
    sparse = sum(layer.sparse for layer in s.layers) / layout.pipeline
    size = 4 * sparse * copies * tokens * s.width * 2 * (layout.expert - 1) / layout.expert
    return size / _speed(layout.expert * layout.tensor, link)


def _speed(group: int, link: float) -> float:
    """Bytes a second between the devices of a group: the slower of the links it needs."""
    return link if group <= NODE else min(link, BETWEEN_NODES)


def _pieces(candidate: Candidate) -> tuple[float, ...]:
    layout = candidate.layout
    return (
        layout.tensor * layout.pipeline * layout.expert,
        _RECOMPUTE.index(candidate.recompute),
        layout.zero,
        candidate.step,
    )
