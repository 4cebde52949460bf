"""What a study trains: networks of several families with equal active parameters, each with every optimizer.

Depth and width are those of a dense network near the size asked for, and the same for all. What is left to set are the
widths of the feed-forward blocks: of the dense layers, and of the experts; they are solved for, since parameters are
linear in them. No torch here, so that a plan can ask what would be trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from farthing.base.errors import UserError
from farthing.cost.flops import parameters
from farthing.recipe import Pretrain, Study
from farthing.recipe.dial import ASPECT, TIED_BELOW, TOKENS_PER_PARAMETER, Dialled, dial, training_flops
from farthing.recipe.types import Family

TOLERANCE = 0.02  # how far active parameters may lie from the size
_EXPERT_STEP, _DENSE_STEP = 16, 8  # widths are multiples of these
_NETWORKS: dict[Family, tuple[str, int]] = {
    "dense": ("llama", 0),
    "moe": ("moe", 0),
    "moe+mla": ("deepseek", 0),
    "moe+mla+mtp": ("deepseek", 1),
}


@dataclass(frozen=True)
class Variant:
    """One family with one optimizer: the pretraining stage that trains it, and what its dial came to."""

    family: Family
    optimizer: str
    stage: Pretrain
    dialled: Dialled


def active_parameters(config: dict[str, Any]) -> int:
    """Parameters a token passes through, without embedding and head; prediction modules are apart."""
    counted = parameters(config)
    return counted.active - counted.embedding - counted.head


def variants(
    study: Study, vocab_size: int, bos_id: int | None = None, eos_id: int | None = None
) -> list[Variant]:
    """Every family with every optimizer, families changing fastest. All have the same steps, batch and warm-up.

    Raises:
        UserError: for a size that has no networks of equal active parameters.
    """
    depth, width = _shape(study, vocab_size)
    sized = {family: _sized(study, family, depth, width, vocab_size) for family in study.families}
    tokens = study.tokens or TOKENS_PER_PARAMETER * study.size
    # The law's compute is the first family's, so that all get the same batch and rate.
    first = dial(sized[study.families[0]], vocab_size).config
    compute = training_flops(first, study.length) * tokens
    batch = study.batch_tokens or max(study.length, round(0.2920 * compute**0.3271))
    found = []
    for optimizer, rate in study.optimizers.items():
        learning = {
            "optimizer": optimizer,
            "lr": rate or 0.3118 * compute**-0.1250,
            "tokens": tokens,
            "batch_tokens": batch,
        }
        for family in study.families:
            stage = sized[family].model_copy(update=learning)
            found.append(Variant(family, optimizer, stage, dial(stage, vocab_size, bos_id, eos_id)))
    return found


def _shape(study: Study, vocab_size: int) -> tuple[int, int]:
    """Depth and width: of the shapes whose dense network is near the size, the one nearest to the dial's aspect."""
    best, width = (math.inf, 0, 0), 0
    while True:
        width += ASPECT
        one, two = (_active(_stage(study, "dense", layers, width), vocab_size) for layers in (1, 2))
        middle = width / ASPECT
        first, last = max(1, math.ceil(0.75 * middle)), max(2, int(1.5 * middle))
        for depth in range(first, last + 1):
            off = abs(math.log((one + (depth - 1) * (two - one)) / study.size))
            # Within a fifth of the size the shape decides: the feed-forward width makes up for the rest.
            best = min(best, (max(off, 0.2) + 0.01 * abs(math.log(depth / middle)), depth, width))
        if one + (first - 1) * (two - one) > 2 * study.size:
            return best[1], best[2]


def _sized(study: Study, family: Family, depth: int, width: int, vocab_size: int) -> Pretrain:
    """The family's stage at this shape with the feed-forward widths that give it the size."""

    def active(**widths: int) -> int:
        return _active(_stage(study, family, depth, width, **widths), vocab_size)

    widths: dict[str, int] = {}
    if family != "dense" and depth > 1:  # together as wide as the dense layer, as in the dial
        config = dial(_stage(study, family, depth, width), vocab_size).config
        chosen = config["num_experts_per_tok"] + config["n_shared_experts"]

        def both(expert: int) -> int:
            return active(moe_intermediate_size=expert, intermediate_size=chosen * expert)

        widths["moe_intermediate_size"] = _solve(both, study.size, _EXPERT_STEP)
    widths["intermediate_size"] = _solve(
        lambda dense: active(**widths | {"intermediate_size": dense}), study.size, _DENSE_STEP
    )
    found = active(**widths)
    if abs(found / study.size - 1) > TOLERANCE:
        raise UserError(
            f"size: no {family} network of {depth} layers and width {width} comes within {TOLERANCE:.0%} of "
            f"{study.size:,} active parameters (embedding and head apart); the nearest has {found:,}: change size"
        )
    return _stage(study, family, depth, width, **widths)


def _solve(active: Callable[[int], int], size: int, step: int) -> int:
    """The multiple of `step` at which `active`, which is linear, comes nearest to `size`; at least one step."""
    at_one, at_two = active(step), active(2 * step)
    return max(step, step * round(1 + (size - at_one) / (at_two - at_one)))


def _stage(study: Study, family: Family, depth: int, width: int, **widths: int) -> Pretrain:
    network, modules = _NETWORKS[family]
    return Pretrain(
        kind="pretrain",
        data=study.data,
        policy=study.policy,
        validation=study.validation,
        vocab_size=study.vocab_size,
        family=network,  # type: ignore[arg-type]
        depth=depth,
        mtp_depth=modules,
        model={"hidden_size": width, "tie_word_embeddings": study.size < TIED_BELOW, **widths},
        length=study.length,
        schedule="constant",  # every point of a curve is then the end of a run of that length
        warmup=study.warmup,
        validate_every=study.validate_every,
        checkpoint_every=study.checkpoint_every,
    )


def _active(stage: Pretrain, vocab_size: int) -> int:
    return active_parameters(dial(stage, vocab_size).config)
