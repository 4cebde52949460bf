"""Bytes that training or serving a model takes on the fullest device, in closed form.

States are counted as mixed-precision trainers keep them (Micikevicius et al., arXiv:1710.03740; ZeRO,
arXiv:1910.02054 section 3.1): weights in the compute precision, and for each trained one a float32 gradient, a
float32 master copy and the optimizer's moments: 18 bytes with AdamW in bfloat16. `fp8` is DeepSeek-V3's
recipe (arXiv:2412.19437 section 3.3): matrices inside the layers in a byte, moments in bfloat16.

For a GPU this is the allocator's total; the driver's own context, communication buffers and
fragmentation come on top, so a plan must leave some room. docs/counting.md has every formula.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from farthing.base.errors import UserError
from farthing.base.sizes import LOGIT_BYTES, PACKED_BYTES, SHORT_LENGTH
from farthing.cost.flops import Recompute
from farthing.cost.shapes import Layer, Matrix, Shapes, shapes

Kind = Literal["pretrain", "sft", "lora", "grpo", "serve"]
Optimizer = Literal["adamw", "muon"]
Code = Literal["usual", "farthing-cpu", "farthing-gpu"]
Precision = Literal["fp32", "bf16", "fp8"]

WIDTH = {"fp32": 4, "bf16": 2, "fp8": 2}  # bytes of a number that is neither a weight nor read by a product

# Measured in 2026-11 with torch 2.13 and glibc 2.36 on x86-64 Linux: what is resident after importing the package;
# what oneDNN's buffers and the heap's holes add to the tensors, as a constant and as a share of them; and what they
# add besides under LoRA, where each linear map makes its result three times: a constant, a share of activations.
CPU_IMPORTS, CPU_BUFFERS, CPU_WASTE = 245 << 20, 120 << 20, 0.1
CPU_LORA_BUFFERS, CPU_LORA_WASTE = 100 << 20, 0.2
_INDEX, _FLOAT = 8, 4  # bytes of an int64 and of a float32


@dataclass(frozen=True)
class Layout:
    """Layout of a model and its batch over data * tensor * pipeline devices.

    `zero` 1 shards the optimizer's states over the data ranks, 2 gradients too, 3 weights too (FSDP).
    `expert` of the data ranks share the routed experts between them. `pipeline` stages run one forward, one
    backward (1F1B): the first holds the activations of as many micro-batches as there are stages.

    Raises UserError for a number below 1, a `zero` that is none of 0 to 3, and an `expert` that does not
    divide `data`.
    """

    data: int = 1
    expert: int = 1
    tensor: int = 1
    pipeline: int = 1
    zero: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "expert", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise UserError(f"the layout's {name} is {getattr(self, name)}; it must be at least 1")
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"the layout's zero is {self.zero}; it must be 0, 1, 2 or 3")
        if self.data % self.expert:
            raise UserError(f"{self.expert} expert ranks do not divide {self.data} data ranks; lower expert")

    @property
    def devices(self) -> int:
        return self.data * self.tensor * self.pipeline


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by what they hold."""

    weights: int = 0
    """In the compute precision; with ZeRO 3 also the layers that are gathered at the moment."""
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
    cache_tokens: int | None = None,
    reference: bool = False,
) -> Memory:
    """Predict the peak of the fullest device.

    Args:
        kind: `pretrain` and `sft` train all weights; `lora` updates of rank `lora_rank`; `grpo` trains (all,
            or LoRA if `lora_rank` is given) and keeps a cache for its rollouts; `serve` only generates.
        micro_tokens: tokens that go through the network in one pass on one device; to serve, those of the
            largest prefill pass.
        seq_len: tokens of a sequence; the cache holds whole ones.
        code: whose activations: `usual` for GPU trainers at large, or this package's, see `cost.activations`.
        cache_tokens: tokens in the cache of `grpo` and `serve`, over all sequences; `micro_tokens` if not
            given.
        reference: whether a second, frozen copy of the model is there for a KL term.

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
    settings = _Settings(kind, micro_tokens, seq_len, precision, optimizer, recompute, layout, code, rank)
    stages = [_stage(s, settings, number) for number in range(layout.pipeline)]
    fullest = max(stages, key=lambda stage: stage.total)
    if kind in ("grpo", "serve"):
        tokens = -(-(cache_tokens or micro_tokens) // seq_len) * seq_len
        held = -(-len(s.layers) // layout.pipeline) / len(s.layers) / layout.tensor
        cache = tokens * cache_bytes_per_token(config, precision) + tokens // seq_len * state_bytes(config)
        fullest = replace(fullest, cache=int(cache * held))
    copies, compiled = 1.0 + reference, 0
    if code == "farthing-cpu" and kind in ("grpo", "serve"):
        if fullest.weights <= PACKED_BYTES:
            copies += (1 + reference) * _packed_share(s, rank)
        compiled = WIDTH["bf16"] * (sum(layer.parameters for layer in s.layers) + s.vocab * s.embed)
    fullest = replace(fullest, weights=int(fullest.weights * copies) + compiled)
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
    return sum(layer.state for layer in shapes(config).layers) * WIDTH["fp32"]


@dataclass(frozen=True)
class _Settings:
    kind: Kind
    tokens: int
    length: int
    precision: Precision
    optimizer: Optimizer
    recompute: Recompute
    layout: Layout
    code: Code
    lora: int


def _stage(s: Shapes, at: _Settings, number: int) -> Memory:
    """The memory of one rank of pipeline stage `number`, counted from 0."""
    count, stages = len(s.layers), at.layout.pipeline
    first, last = number == 0, number == stages - 1
    layers = [*s.layers[count * number // stages : count * (number + 1) // stages]]
    depths = [s.mtp] * (s.mtp_depth if last and at.kind != "serve" else 0)
    states = _states(s, at, [*layers, *depths], first, last)
    if at.kind != "grpo":
        layers += depths
    shared = at.tokens / at.layout.tensor
    kept, most = _token_bytes(s, at, layers, last)
    working = most * shared
    if at.kind == "serve":
        return replace(states, activations=int(working))
    in_flight = stages - number
    activations = in_flight * kept * shared
    head = _head(s, at, WIDTH[at.precision], 0 if at.lora else s.vocab * s.embed) if last else 0
    # The head is done when the layers' backward pass begins: the larger of the two needs its room.
    held = _held_logits(s, at, WIDTH[at.precision]) if last else 0
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

    if at.recompute == "full":  # recomputes one layer at a time
        working += max(kept("none"))
    # the final norm's input and output, and the rows that the head reads
    return sum(kept(at.recompute)) + (3 * s.width * b if last else 0), working


def _states(s: Shapes, at: _Settings, layers: Sequence[Layer], first: bool, last: bool) -> Memory:
    """Weights, gradients and optimizer of a rank that has these layers."""
    layout, table = at.layout, s.vocab * s.embed
    tables = (first or (last and s.tied)) + (last and not s.tied)
    outer = tables * table / layout.tensor + (s.outside.parameters if last else 0)

    def held(zero: int) -> float:
        """Parameters on a rank of something that is sharded from this level of ZeRO on."""
        if layout.zero < zero:
            return outer + sum(_share(layer, layout) for layer in layers)
        return (outer + sum(_share(layer, whole) for layer in layers)) / layout.data

    whole = replace(
        layout, expert=1
    )  # sharding over the data ranks divides experts by what expert ranks left
    b = WIDTH[at.precision]
    outside = outer / (layout.data if layout.zero == 3 else 1)
    weights = outside * b + (held(3) - outside) * (1 if at.precision == "fp8" else b)
    if at.kind == "serve":
        return Memory(weights=int(weights))
    if layout.zero == 3:  # two layers are gathered at a time, the one at work and the next
        weights += 2 * max(_share(layer, layout) for layer in layers) * b
    moment = 2 if at.precision == "fp8" else _FLOAT
    state = 2 * moment + (0 if at.precision == "fp32" and at.code == "usual" else _FLOAT)
    if at.lora:
        trained = sum(_lora(s, layer, at.lora) for layer in layers) / layout.tensor
        weights += trained * b
        gradients, masters = (trained / (layout.data if layout.zero >= level else 1) for level in (2, 1))
        by_muon = 1.0
    else:
        gradients, masters = held(2), held(1)
        # shares of the parameters are the same on every rank, near enough for the few that AdamW keeps
        by_muon = sum(_muon_share(layer, layout) for layer in layers) / held(9)
    states = masters * (state - (by_muon * moment if at.optimizer == "muon" else 0))
    return Memory(weights=int(weights), gradients=int(gradients * _FLOAT), optimizer=int(states))


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
    numbers = at.tokens * s.vocab
    if at.code == "usual":  # logits, their float32 copy, its gradient
        return numbers * (1 + s.mtp_depth) * (b + 2 * _FLOAT) / at.layout.tensor
    if at.kind != "grpo" and numbers * b <= LOGIT_BYTES:
        # logits, log-probabilities and the gradient of one loss, and the log-probabilities that others keep; a CPU
        # needs less, the gradient and a product's logits
        return numbers * (3 + s.mtp_depth) * b + table * b
    chunk = min(LOGIT_BYTES, numbers * _FLOAT)
    # logits and their softmax; or its rounded copy beside the gradient's sum so far and its next term
    return max(2 * chunk, chunk * (1 + b / _FLOAT) + table * (b + 2 * _FLOAT))


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


def layer_bytes(
    s: Shapes,
    layer: Layer,
    recompute: Recompute,
    code: Code,
    precision: Precision,
    seq_len: int,
    trained: bool,
) -> int:
    """Bytes a token that one layer keeps until its backward pass, in sequences of `seq_len`.

    `trained` says whether norms are trained: under LoRA they are not, and keep less. In `fp8` what matrix
    products and the activation read is kept in a byte (arXiv:2412.19437 section 3.3.3), the rest in bfloat16.
    """
    b, narrow = WIDTH[precision], 1 if precision == "fp8" else WIDTH[precision]
    if recompute == "full":
        return s.width * b
    again = recompute == "selective"
    inside, outputs = _norm(code, b, trained)
    kept = s.width * (layer.norms * inside * b + 2 * (not again) * outputs * narrow)
    # a window cuts a longer row into blocks, whose results are kept beside all of them together
    blocks = code != "usual" and layer.window is not None and layer.window < seq_len
    short = is_short(code, precision, SHORT_LENGTH if blocks else seq_len, masked=blocks)
    kept += (blocks and not short) * s.heads * s.v * b
    kept += _latent(s, code, b, again, inside, short) if s.mla else _grouped(s, code, b, inside, short)
    return kept + _feedforward(s, layer, code, b, narrow, again, trained)


def is_short(code: Code, precision: Precision, seq_len: int, masked: bool = False) -> bool:
    """Whether our attention keeps neither its result nor a statistic, and recomputes its weights: under a mask in
    bfloat16 only."""
    ours = precision == "bf16" or (precision == "fp32" and not masked)
    return code == "farthing-cpu" and ours and seq_len <= SHORT_LENGTH


def working_bytes(s: Shapes, layer: Layer, b: int, short_length: int = 0) -> int:
    """Bytes a token that the backward pass of one layer needs at most at a time, besides what is kept: the
    gradients of the feed-forward's inner tensors and of its ends, or of q, k, v and the result. Attention in
    short sequences of ours needs its weights, what they were made from and both gradients as well."""
    wide = (s.gates + 3) * layer.inner + 2 * s.width
    if layer.sparse:  # rows are copied for each expert that a token goes to: input, output gradient, result
        wide += 3 * s.top_k * s.width
    attention = 4 * s.heads * (s.qk + s.v + short_length) + 2 * s.width
    return max(wide, attention) * b


def _norm(code: Code, b: int, trained: bool) -> tuple[int, int]:
    """Times its width that an RMSNorm keeps for itself, and as the output that the next product reads."""
    if code != "farthing-cpu":
        return 1, 1  # its input
    if b == 2:  # [x, -x], and their normalised form if the gain is trained
        return (4 if trained else 2), 1
    return (2 if trained else 1), 1  # its input and the normalised input


def _grouped(s: Shapes, code: Code, b: int, inside: int, short: bool) -> int:
    h, k = s.heads, s.kv_heads
    kept = (h * s.qk + k * s.qk + k * s.v + h * s.v) * b + (not short) * h * _FLOAT
    queries_keys = (h + k) * s.qk * b
    if code == "usual":
        return kept + s.qk_norm * queries_keys
    # Ours are one product, of which the values are a part, so q and k live as long before rotation as after;
    # norms of them read it where it is, but for the CPU's in bfloat16, which read copies.
    copies = inside if code == "farthing-cpu" and b == 2 else inside - 1
    return kept + queries_keys * (1 + s.qk_norm * copies)


def _latent(s: Shapes, code: Code, b: int, again: bool, inside: int, short: bool) -> int:
    assert s.mla is not None
    m, h = s.mla, s.heads
    ranks, statistic = (m.q_lora or 0) + m.kv_lora, h * _FLOAT
    if again:  # the latents before their norms, and attention's result
        return (ranks + m.rope + h * m.v) * b + statistic
    if code == "usual":
        return (2 * ranks + m.rope + 2 * h * (s.qk + m.v)) * b + statistic
    # The first product's output is kept whole for the norms that read parts of it, but for the CPU's in
    # bfloat16, which reads copies.
    fused = (m.q_lora or h * s.qk) + m.kv_lora + m.rope
    norms = (inside + 1) * ranks if code == "farthing-cpu" and b == 2 else fused + inside * ranks
    if code == "farthing-gpu" or short:  # values are a part of the up-projection's output, kept whole
        return (norms + 2 * h * s.qk + h * (m.nope + m.v) + h * m.v) * b + (not short) * statistic
    # The CPU's fused attention wants values as wide as keys and gives a result as wide, to be cut.
    cut = h * m.v if m.v < s.qk else 0
    return (norms + 4 * h * s.qk + cut) * b + statistic


def _feedforward(s: Shapes, layer: Layer, code: Code, b: int, narrow: int, again: bool, trained: bool) -> int:
    before, product = s.gates * layer.inner * narrow, (not again) * layer.inner * narrow
    if not layer.sparse:
        return before + product
    router = s.experts * _FLOAT + s.top_k * (_INDEX + _FLOAT)
    if code == "usual":  # a token's row once for each of its experts
        return before + product + s.top_k * s.width * narrow + router
    # Ours makes the routed experts' rows and products again; a router that is trained reads a float32 copy.
    shared = (not again) * (layer.inner - s.top_k * s.expert_size) * b
    copy = s.width * _FLOAT if b < _FLOAT and trained else 0
    return before + shared + router + copy + s.top_k * (b + 2 * _INDEX + _FLOAT)
