"""Bytes that training or serving a model takes on the fullest device, in closed form.

States are counted as mixed-precision trainers keep them (Micikevicius et al., arXiv:1710.03740; ZeRO,
arXiv:1910.02054 section 3.1): weights in the compute precision, and for each trained one a float32 gradient, a
float32 master copy and the optimizer's moments: 18 bytes with AdamW in bfloat16; 16 where all of them are sharded
(FSDP), since the shard is the float32 copy and bfloat16 is made of it as it is gathered. `pure-bf16` keeps all four
numbers in bfloat16, 8 bytes. `fp8` is DeepSeek-V3's recipe (arXiv:2412.19437 section 3.3): matrices inside the
layers in a byte, moments in bfloat16.

For a GPU this is the allocator's total; the driver's own context, communication buffers and
fragmentation come on top, so a plan must leave some room. docs/counting.md has every formula, and how well it agrees
with published figures.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.base.sizes import LOGIT_BYTES, PACKED_BYTES
from farthing.cost.activations import (
    FLOAT,
    WIDTH,
    Code,
    Precision,
    is_short,
    layer_bytes,
    working_bytes,
)
from farthing.cost.flops import Recompute
from farthing.cost.shapes import Layer, Matrix, Shapes, shapes

Kind = Literal["pretrain", "sft", "lora", "grpo", "serve"]
Optimizer = Literal["adamw", "muon", "adamw-8bit"]
Bits = Literal[16, 8, 4]

# Bytes of a frozen weight: LLM.int8 (arXiv:2208.07339), and 4-bit NormalFloat with doubly quantised constants, 4.127
# bits (arXiv:2305.14314 section 3).
FROZEN = {8: 1.0, 4: 4.127 / 8}
_BLOCK = 2048  # moments of 8 bits that share a float32 scale (arXiv:2110.02861 section 2.1)

# Measured in 2026-11 with torch 2.13 and glibc 2.36 on x86-64 Linux: what is resident after importing the package;
# what oneDNN's buffers and the heap's holes add to the tensors, as a constant and as a share of them; and what they
# add besides under LoRA, where each linear map makes its result three times: a constant, a share of activations.
CPU_IMPORTS, CPU_BUFFERS, CPU_WASTE = 245 << 20, 120 << 20, 0.1
CPU_LORA_BUFFERS, CPU_LORA_WASTE = 100 << 20, 0.2


@dataclass(frozen=True)
class Layout:
    """Layout of a model and its batch over data * tensor * pipeline * context devices.

    `zero` 1 shards the optimizer's states over the data ranks, 2 gradients too, 3 weights too (FSDP).
    `expert` of the data ranks share the routed experts between them. `pipeline` stages run one forward, one
    backward (1F1B): the first holds the activations of as many micro-batches as there are stages. `context` ranks
    share the tokens of a sequence, and the states as data ranks do; each gathers the keys and values of all.

    Raises UserError for a number below 1, a `zero` that is none of 0 to 3, and an `expert` that does not
    divide `data`.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0
    context: int = 1

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor", "pipeline", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"the layout's {name} is {getattr(self, name)}; it must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"the layout's zero is {self.zero}; it must be 0, 1, 2 or 3")
        if self.data % self.expert:
            raise UserError(f"{self.expert} expert ranks do not divide {self.data} data ranks; lower expert")

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline * self.context

    @property
    def sharding(self) -> int:
        """Ranks that states are sharded over."""
        return self.data * self.context


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by what they hold."""

    weights: int = 0
    """In the compute precision; with ZeRO 3 what is gathered at the moment, beside the shard where that is not the
    master copy."""
    gradients: int = 0
    optimizer: int = 0
    """Master copies and moments."""
    activations: int = 0
    logits: int = 0
    """Memory of the head beyond that of the layers' backward pass, which comes later."""
    cache: int = 0
    runtime: int = 0
    """The process itself: on a CPU the interpreter, its libraries, and what the heap cannot use again."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The fields by name, `total` not among them."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def memory(
    config: Mapping[str, Any],
    *,
    kind: Kind = "pretrain",
    micro_tokens: int,
    seq_len: int,
    precision: Precision = "bf16",
    optimizer: Optimizer = "adamw",
    recompute: Recompute = "none",
    layout: Layout | None = None,
    code: Code = "usual",
    lora_rank: int = 0,
    base_bits: Bits = 16,
    cache_tokens: int | None = None,
    scored_tokens: int | None = None,
    reference: bool = False,
    fused_loss: bool = False,
    offload: bool = False,
) -> Memory:
    """Predict the peak of the fullest device.

    Args:
        kind: `pretrain` and `sft` train all weights; `lora` updates of rank `lora_rank`; `grpo` trains (all,
            or LoRA if `lora_rank` is given) and keeps a cache for its rollouts; `serve` only generates.
        micro_tokens: tokens that go through the network in one pass of one data rank; to serve, those of the
            largest prefill pass.
        seq_len: tokens of a sequence; the cache holds whole ones.
        code: whose activations: `usual` for GPU trainers at large, or this package's, see `cost.activations`.
        base_bits: of the weights inside the layers that LoRA leaves frozen.
        cache_tokens: tokens in the cache of `grpo` and `serve`, over all sequences; `micro_tokens` if not
            given.
        scored_tokens: of `micro_tokens`, those whose logits are computed; all if not given.
        reference: whether a second, frozen copy of the model is there for a KL term.
        fused_loss: whether one kernel goes from logits to their gradient without float32 copies, as a compiled loss.
        offload: whether the host keeps the optimizer's states, gradients and, with ZeRO 3, the sharded weights
            (ZeRO-Offload, arXiv:2101.06840).

    Raises UserError as `shapes.shapes`, and for counts below 1 or more pipeline stages than layers.
    """
    layout = layout or Layout()
    s = shapes(config)
    for name, count in (("micro_tokens", micro_tokens), ("seq_len", seq_len)):
        if count < 1:
            raise UserError(f"{name} is {count}; it must be at least 1")
    if layout.pipeline > len(s.layers):
        raise UserError(f"{layout.pipeline} pipeline stages for {len(s.layers)} layers; lower pipeline")
    rank = lora_rank if kind in ("lora", "grpo") else 0
    if kind == "lora" and rank < 1:
        raise UserError("a LoRA stage needs a rank; give lora_rank")
    if base_bits != 16 and not rank:
        raise UserError(f"weights of {base_bits} bits cannot be trained; train a LoRA beside them")
    local = -(-micro_tokens // layout.context)
    scored = None if scored_tokens is None else -(-scored_tokens // layout.context)
    settings = _Settings(
        kind, local, seq_len, precision, optimizer, recompute, layout, code, rank,
        scored, base_bits, fused_loss, offload,
    )  # fmt: skip
    stages = [_stage(s, settings, number) for number in range(layout.pipeline)]
    fullest = max(stages, key=lambda stage: stage.total)
    if kind in ("grpo", "serve"):
        tokens = -(-(cache_tokens or micro_tokens) // seq_len) * seq_len
        held = -(-len(s.layers) // layout.pipeline) / len(s.layers) / layout.tensor
        cache = tokens * cache_bytes_per_token(config, precision) + tokens // seq_len * state_bytes(config)
        fullest = replace(fullest, cache=int(cache * held))
    weights: float = fullest.weights
    if reference:
        frozen = replace(settings, kind="serve", lora=0, offload=False)
        weights += max(_stage(s, frozen, number).weights for number in range(layout.pipeline))
    if code == "farthing-cpu" and kind in ("grpo", "serve"):
        if fullest.weights <= PACKED_BYTES:
            weights += weights * _packed_share(s, rank)
        weights += WIDTH["bf16"] * (sum(layer.parameters for layer in s.layers) + s.vocab * s.embed)
    fullest = replace(fullest, weights=int(weights))
    if code == "farthing-cpu":
        waste = CPU_WASTE * fullest.total
        if rank:
            waste += CPU_LORA_BUFFERS + CPU_LORA_WASTE * (fullest.activations + fullest.logits)
        fullest = replace(fullest, runtime=CPU_IMPORTS + CPU_BUFFERS + int(waste))
    return fullest


def tokens_per_pass(
    config: Mapping[str, Any],
    memory_gb: float,
    *,
    length: int,
    precision: Precision,
    code: Code,
    kind: Kind = "pretrain",
    lora: int = 0,
) -> int:
    """The most tokens whose activations and logits, forward and backward, take `memory_gb` (1e9 bytes); at least one.

    Trainer and planner both cut their batches by it. Only what grows with a pass counts: not the gradient of the head's
    weights, which `Memory.logits` includes and which alone may be larger than `memory_gb`. Every shorter pass fits too.

    Args:
        length: tokens of a sequence.
        lora: rank of the adapters; 0 trains every parameter.
    """
    s, b = shapes(config), WIDTH[precision]
    settings = _Settings(kind, 1, length, precision, "adamw", "none", Layout(), code, lora)
    layers = [*s.layers, *[s.mtp] * (s.mtp_depth if kind != "grpo" else 0)]
    kept, working = _token_bytes(s, settings, layers, last=True)
    unchunked = LOGIT_BYTES // (s.vocab * b)  # most tokens whose logits may be held at once

    def used(tokens: int) -> float:
        own = replace(settings, tokens=tokens)
        return kept * tokens + max(working * tokens + _held_logits(s, own, b), _head(s, own, b, table=0))

    def most_used(tokens: int) -> float:
        """By any pass of up to `tokens`: the first one in chunks takes less than the last one without."""
        return max(used(tokens), used(min(tokens, unchunked)))

    budget = memory_gb * 1e9
    return max(1, bisect_right(range(1, int(budget / kept) + 2), budget, key=most_used))


def precision_of(dtype: object) -> Precision:
    """The precision of torch's bfloat16 or float32, or of a dtype's name."""
    return "fp32" if str(dtype).endswith("float32") else "bf16"


def code_of(device: str) -> Code:
    """The code whose activations are counted on a kind of device, `cpu` or `cuda`."""
    return "farthing-cpu" if device == "cpu" else "farthing-gpu"


def cache_bytes_per_token(config: Mapping[str, Any], precision: Precision = "bf16") -> int:
    """Bytes that a token leaves in the cache over all layers: its keys and values, or with latent attention
    one latent and one rotated key (arXiv:2405.04434 table 1)."""
    return sum(layer.cached for layer in shapes(config).layers) * WIDTH[precision]


def state_bytes(config: Mapping[str, Any]) -> int:
    """Bytes of a sequence's recurrent states over all layers, however long it is; 0 where every layer attends."""
    return sum(layer.state for layer in shapes(config).layers) * FLOAT


@dataclass(frozen=True)
class _Settings:
    kind: Kind
    tokens: int
    """Of one rank in one pass."""
    length: int
    precision: Precision
    optimizer: Optimizer
    recompute: Recompute
    layout: Layout
    code: Code
    lora: int
    scored: int | None = None
    bits: Bits = 16
    fused_loss: bool = False
    offload: bool = False


def _stage(s: Shapes, at: _Settings, number: int) -> Memory:
    """The memory of one rank of pipeline stage `number`, counted from 0."""
    count, stages, tensor = len(s.layers), at.layout.pipeline, at.layout.tensor
    first, last = number == 0, number == stages - 1
    layers = [*s.layers[count * number // stages : count * (number + 1) // stages]]
    depths = [s.mtp] * (s.mtp_depth if last and at.kind != "serve" else 0)
    states = _states(s, at, [*layers, *depths], first, last)
    if at.kind != "grpo":
        layers += depths
    b = WIDTH[at.precision]
    shared = at.tokens / tensor
    kept, most = _token_bytes(s, at, layers, last)
    working = most * shared
    # Ranks that share matrices also share a row's channels between them, but products read it whole.
    whole = at.tokens * s.width * b * (1 - 1 / tensor)
    if at.kind == "serve":
        return replace(states, activations=int(working + whole))
    in_flight = stages - number
    activations = in_flight * kept * shared
    if at.recompute == "none":  # the inputs of attention and feed-forward
        activations += in_flight * 2 * len(layers) * whole
    working += 4 * whole + _gathered_keys(s, at, b) + _reduced(s, at, layers, last)
    head = _head(s, at, b, 0 if at.lora else s.vocab * s.embed) + whole if last else 0
    # The head is done when the layers' backward pass begins: the larger of the two needs its room.
    held = _held_logits(s, at, b) if last else 0
    if head < working + held:
        return replace(states, activations=int(activations + working), logits=int(held))
    return replace(states, activations=int(activations), logits=int(head))


def _token_bytes(s: Shapes, at: _Settings, layers: Sequence[Layer], last: bool) -> tuple[int, int]:
    """Bytes per token that these layers keep for the backward pass, and the working set of one of them."""
    b, trained = WIDTH[at.precision], not at.lora
    short = at.length if is_short(at.code, at.precision, at.length) else 0
    working = max(working_bytes(s, layer, b, short) for layer in layers)

    def kept(recompute: Recompute) -> list[int]:
        return [
            layer_bytes(s, layer, recompute, at.code, at.precision, at.length, trained) for layer in layers
        ]

    if at.recompute in ("alternate", "full"):  # recomputes one layer at a time
        working += max(kept("none"))
    # the final norm's input and output, and the rows that the head reads
    return sum(kept(at.recompute)) + (3 * s.width * b if last else 0), working


def _gathered_keys(s: Shapes, at: _Settings, b: int) -> float:
    """Keys and values of a layer that come from the other ranks of a sequence."""
    others = (at.layout.context - 1) * at.tokens
    return others * s.kv_heads * (s.qk + s.v) * b / at.layout.tensor


def _reduced(s: Shapes, at: _Settings, layers: Sequence[Layer], last: bool) -> float:
    """Whole gradients on their way to the rank or host that keeps them: a layer's, in float32 to be summed, and the
    head's, which waits for the embedding's. A pipeline keeps them whole anyway until its last micro-batch."""
    if at.lora or at.layout.pipeline > 1 or not (at.layout.zero >= 2 or at.offload):
        return 0
    b = WIDTH[at.precision]
    to_sum = _gradient(at) if at.layout.zero >= 2 else 0
    layer = max(_share(layer, at.layout) for layer in layers) * (b + to_sum)
    return layer + last * s.vocab * s.embed * b / at.layout.tensor


def _gradient(at: _Settings) -> int:
    """Bytes of a gradient that is kept."""
    return 2 if at.precision == "pure-bf16" else FLOAT


def _states(s: Shapes, at: _Settings, layers: Sequence[Layer], first: bool, last: bool) -> Memory:
    """Weights, gradients and optimizer of a rank that has these layers."""
    layout, table = at.layout, s.vocab * s.embed
    tables = (first or (last and s.tied)) + (last and not s.tied)
    outer = tables * table / layout.tensor + (s.outside.parameters if last else 0)
    # sharding over the data ranks divides experts by what expert ranks left
    unshared = replace(layout, expert=1)

    def held(zero: int) -> float:
        """Parameters on a rank of something that is sharded from this level of ZeRO on."""
        if layout.zero < zero:
            return outer + sum(_share(layer, layout) for layer in layers)
        return (outer + sum(_share(layer, unshared) for layer in layers)) / layout.sharding

    sharded, b = layout.zero == 3, WIDTH[at.precision]
    inner_width = FROZEN.get(at.bits, 1 if at.precision == "fp8" else b)
    outside = outer / (layout.sharding if sharded else 1)
    weights = outside * b + (held(3) - outside) * inner_width
    if at.kind == "serve":
        return Memory(weights=int(weights))
    shard_is_master = at.code == "usual" and at.precision == "bf16" and not at.lora
    if sharded:
        weights = 0 if at.offload or shard_is_master else weights
        # the layer at work and the next, all in a pipeline; what is outside the layers stays from head to embedding
        several = layout.pipeline > 1
        shares = [_share(layer, layout) for layer in layers]
        weights += (sum(shares) if several else 2 * max(shares)) * inner_width + outer * b
    if at.bits != 16:  # the matrix at work in the compute precision
        weights += max(m.inputs * m.outputs for layer in layers for m in layer.matrices) / layout.tensor * b
    moment: float = 2 if at.precision in ("fp8", "pure-bf16") else FLOAT
    if at.optimizer == "adamw-8bit":
        moment = 1 + FLOAT / _BLOCK
    alone = at.precision == "pure-bf16" or (at.precision == "fp32" and at.code == "usual")
    state = 2 * moment + (0 if alone else FLOAT)
    if at.lora:
        trained = sum(_lora(s, layer, at.lora) for layer in layers) / layout.tensor
        weights += trained * b
        gradients, masters = (trained / (layout.sharding if layout.zero >= z else 1) for z in (2, 1))
        by_muon = 1.0
    else:
        # A pipeline sums the gradients of its micro-batches before it reduces them.
        gradients, masters = held(2 if layout.pipeline == 1 else 4), held(1)
        # shares of the parameters are the same on every rank, near enough for the few that AdamW keeps
        by_muon = sum(_muon_share(layer, layout) for layer in layers) / held(4)
    if at.offload:
        return Memory(weights=int(weights))
    states = masters * (state - (by_muon * moment if at.optimizer == "muon" else 0))
    return Memory(weights=int(weights), gradients=int(gradients * _gradient(at)), optimizer=int(states))


def _share(layer: Layer, layout: Layout) -> float:
    """Parameters of a layer on one rank before any sharding over the data ranks."""
    split = layer.weights("attention", "feedforward", "mtp") + layer.weights("expert") / layout.expert
    return split / layout.tensor + layer.weights("router") + layer.vectors


def _muon_share(layer: Layer, layout: Layout) -> float:
    return _share(layer, layout) - layer.weights("router") - layer.vectors


def _lora(s: Shapes, layer: Layer, rank: int) -> int:
    """Parameters of the updates of a layer's linear maps; maps with one input that are fused share one."""
    total = 0
    for role in ("attention", "feedforward"):
        matrices: list[Matrix] = [m for m in layer.matrices if m.role == role]
        fused = [m for m in matrices[:-1] if m.inputs == s.width]
        single = [m for m in matrices if m not in fused]
        if fused:
            total += rank * (s.width + sum(m.outputs * m.count for m in fused))
        total += sum(rank * (m.inputs + m.outputs) * m.count for m in single)
    return total


def _packed_share(s: Shapes, lora: int) -> float:
    """The part of the weights that the CPU's sampler keeps a second time, laid out for oneDNN, which reads prompts:
    linear maps and the head, not stacked experts, routers and norms; under LoRA the head alone."""
    table = s.vocab * s.embed
    inside = sum(layer.weights("attention", "feedforward") for layer in s.layers)
    total = sum(layer.parameters for layer in s.layers) + table * (1 if s.tied else 2)
    return (table + (0 if lora else inside)) / total


def _head(s: Shapes, at: _Settings, b: int, table: int) -> float:
    """Peak memory of the head's loss: logits and the gradient of its `table` trained weights."""
    numbers = (at.tokens if at.scored is None else at.scored) * s.vocab
    if at.code == "usual":
        # logits; in float32 the log-softmax, its gradient and the logits' gradient, and with tensor parallelism the
        # softmax (torch's loss_parallel); one fused kernel needs logits and their gradient alone
        each = 2 * b if at.fused_loss else b + (3 + (at.layout.tensor > 1)) * FLOAT
        return numbers * (1 + s.mtp_depth) * each / at.layout.tensor
    if at.kind != "grpo" and numbers * b <= LOGIT_BYTES:
        # logits, log-probabilities and the gradient of one loss, and the log-probabilities that others keep; a CPU
        # needs less, the gradient and a product's logits
        return numbers * (3 + s.mtp_depth) * b + table * b
    chunk = min(LOGIT_BYTES, numbers * FLOAT)
    # logits and their softmax; or its rounded copy beside the gradient's sum so far and its next term
    return max(2 * chunk, chunk * (1 + b / FLOAT) + table * (b + 2 * FLOAT))


def _held_logits(s: Shapes, at: _Settings, b: int) -> float:
    """What the head's loss keeps for the next step on a CPU (`model.kernels.logprobs`), a buffer for each loss."""
    if at.code != "farthing-cpu":
        return 0
    return min(LOGIT_BYTES, at.tokens * s.vocab * b) * (1 + (at.kind != "grpo") * s.mtp_depth)


def check_latent(config: Mapping[str, Any]) -> None:
    """Raises UserError if a latent cache is larger than the keys and values it stands for."""
    s = shapes(config)
    if s.mla is None:
        return
    heads = config.get("num_key_value_heads") or s.heads
    latent, replaced = s.mla.kv_lora + s.mla.rope, int(heads) * (s.qk + s.v)
    if latent > replaced:
        raise UserError(
            f"kv_lora_rank {s.mla.kv_lora}: the latent cache of {latent} numbers a token and layer is larger than "
            f"the {replaced} of the keys and values it replaces; lower it to {max(1, replaced - s.mla.rope)} or less"
        )
