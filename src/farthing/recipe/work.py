"""The work of a stage, for a plan to turn into seconds, memory and dollars. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from farthing.cost import memory
from farthing.cost.flops import parameters
from farthing.cost.shapes import shapes

Config = Mapping[str, Any]  # a model's config.json

SAMPLED_AT_ONCE = 64  # sequences, in training: beyond it a CPU's products are no faster a row
EVALUATED_AT_ONCE = 48
PROMPT_TOKENS = 1024  # of cache for each question's prompt, shared by its samples
BYTES_PER_TOKEN = 4  # of English text


@dataclass(frozen=True)
class Guess:
    """Assumptions of a plan about a model's answers."""

    answer: float
    """Mean length of an answer, as a share of the longest that training allows."""
    kept: float
    """Share of the groups whose answers do not all earn the same; the others train by a KL term alone."""
    prompt: float
    """Tokens of a question in its template."""
    length: float | None = None
    """Mean length of an answer in tokens, where that is known; `answer` does not count then."""
    source: str = ""
    """What the figures are from."""

    def answer_tokens(self, longest: int) -> float:
        """Mean length of an answer of at most `longest` tokens."""
        return max(1.0, min(longest, self.answer * longest if self.length is None else self.length))

    def prompt_tokens(self, system: str | None) -> float:
        """Tokens of a question after a system message."""
        return self.prompt + len(system or "") / BYTES_PER_TOKEN


@dataclass(frozen=True)
class Answers:
    """Questions answered in a step of a stage, or in an evaluation."""

    questions: int
    answers: int
    """To all questions together."""
    at_once: int
    """Sequences in a batch."""
    prompt: float
    """Tokens of a prompt."""
    mean: float
    """Tokens of an answer."""
    longest: int
    """Tokens of the longest answer."""
    rounds: float = 1.0
    """Times all of it is done."""


@dataclass(frozen=True)
class StageWork:
    """The work of a stage. `tokens`, `pairs` and `scored` are means over the steps that train."""

    config: Config
    """config.json of the network that it trains and leaves."""
    steps: int
    tokens: float
    """Tokens through the network."""
    pairs: float
    """Token pairs in attention, a token with itself included."""
    scored: float
    """Tokens whose logits are computed."""
    length: int
    """Tokens of a row, or of the longest answer."""
    save_every: int
    """Steps between checkpoints."""
    memory_gb: float
    """Memory for the activations of a pass."""
    forwards: float = 3.0
    """Cost of a step in forward passes; a backward pass counts as two."""
    training_steps: float = 1.0
    """Share of the steps that train at all."""
    updates: int = 1
    """Optimizer steps in each of these."""
    lora: int = 0
    """Rank of the adapters; 0 trains every parameter."""
    muon: bool = False
    """Matrices are trained by Muon."""
    lessons: int = 0
    """Worked solutions that are written before it starts."""
    reference: bool = False
    """A frozen copy of the model is kept."""
    beside: tuple[Config, ...] = ()
    """Models that judge the answers, kept in memory."""
    sampling: Answers | None = None
    """Answers sampled in each step."""
    cache_tokens: int = 0

    @property
    def trained(self) -> float:
        """Parameters that the optimizer updates; under LoRA, rank times inputs and outputs of the layers' matrices."""
        if not self.lora:
            return parameters(self.config).total
        return sum(
            self.lora * (matrix.inputs + matrix.outputs) * matrix.count
            for layer in shapes(self.config).layers
            for matrix in layer.matrices
            if matrix.role in ("attention", "feedforward")
        )

    @property
    def muon_flops(self) -> float:
        """Of orthogonalising the layers' matrices once: five rounds of X X^T, its square and their sum times X
        (arXiv:2502.16982 section 2.1)."""
        if not self.muon or self.lora:
            return 0.0
        sizes = (
            (min(matrix.inputs, matrix.outputs), max(matrix.inputs, matrix.outputs), matrix.count)
            for layer in shapes(self.config).layers
            for matrix in layer.matrices
        )
        return sum(5.0 * count * (4 * m * m * n + 2 * m**3) for m, n, count in sizes)

    @property
    def memory_kind(self) -> memory.Kind:
        """The kind as which `cost.memory` counts it."""
        return "grpo" if self.sampling else "lora" if self.lora else "pretrain"
