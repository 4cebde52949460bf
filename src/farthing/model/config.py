"""The one description of a network. Every family's adapter (`farthing.weights`) translates to and from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv:2104.09864) and how it is stretched to longer contexts.

    `kind` is `default`, `linear` (positions divided by `factor`) or `llama3` (low frequencies divided by `factor`,
    high ones kept, a ramp between; Llama 3.1's model card).
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of a `Decoder`.

    Raises:
        ValueError: when the numbers cannot form a network (heads that do not divide, an odd head width).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float = 1e-5
    rope: Rope = field(default_factory=Rope)
    max_positions: int = 2048
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm over each head of q and k before rotation (Qwen3)

    def __post_init__(self) -> None:
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
        for name, number in (("rms_eps", self.rms_eps), ("rope theta", self.rope.theta)):
            if not isinstance(number, int | float) or not number > 0:
                raise ValueError(f"{name} is {number!r}; it must be a number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads ({self.num_kv_heads}) must divide num_heads ({self.num_heads}); correct config.json"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embedding needs an even number")
