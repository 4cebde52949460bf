"""Reinforcement learning with verifiable rewards as a stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from farthing.base.device import Ranks
from farthing.cost.meter import Meter
from farthing.engine import Model
from farthing.recipe import Grpo
from farthing.stages.at import At
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.train.grpo import Learner
from farthing.train.loop import Progress, train
from farthing.train.optim import MasterWeights, add_lora
from farthing.train.rollout import Roller


def run(spec: Grpo, start: Path | None, at: At) -> Path:
    """As `stages.Kind.run`."""
    assert start is not None
    model = at.load(start)
    at.say(f"{at.folder.name}: {spec.steps} steps of {spec.prompts} questions x {spec.group} answers")
    with at.progress(spec.steps, model) as progress:
        train_grpo(
            spec,
            model,
            at.folder,
            seed=at.seed,
            held_out=at.held_out,
            pool=at.pool,
            meter=at.meter,
            ranks=at.ranks,
            progress=progress,
        )
    return at.finish(model, spec.steps, merged=bool(spec.lora))


def train_grpo(
    stage: Grpo,
    model: Model,
    folder: Path,
    *,
    seed: int,
    held_out: set[str],
    pool: VerifierPool,
    meter: Meter,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train `model` in place; metrics and checkpoints go to `folder`. A killed run continues from its checkpoint.

    Args:
        held_out: keys of the questions that must never be trained on.

    Raises:
        Diverged: when the gradient is broken, or sampler and trainer disagree.
    """
    decoder = model.decoder
    reference = None
    if stage.kl:
        weight = decoder.embed.weight
        reference = Model(model.folder, weight.dtype, str(weight.device), decoder.stored).decoder
        reference.requires_grad_(False)
    if stage.lora:
        add_lora(decoder, stage.lora, stage.lora_alpha, seed)
    weights = MasterWeights(decoder, stage.optimizer, stage.lr, stage.betas, stage.weight_decay)
    engine = model.engine(stage.sampled_at_once, stage.cache_tokens, record_routing=True)
    stream = Mixture(stage.tasks, seed).stream(exclude=held_out)
    roller = Roller(stage, model, engine, stream, pool, meter, seed, ranks)
    state = {"cursor": 0}
    learner = Learner(stage, decoder, reference, weights, model.hf_config, meter, ranks)

    def one_step(step: int) -> dict[str, Any]:
        started, before = time.monotonic(), dict(meter.totals().seconds)
        batch, state["cursor"] = roller.collect(step, state["cursor"])
        measured = batch.metrics(ranks)
        if measured["timeout"]:
            progress.warn(
                f"step {step + 1}: {measured['timeout']:.1%} of the answers could not be judged in time, in two tries, "
                "and earn nothing; is the machine busy?"
            )
        learned = learner.learn(batch, step)
        seconds, totals = time.monotonic() - started, meter.totals()
        spent = {name: value - before.get(name, 0.0) for name, value in totals.seconds.items()}
        sampled = ranks.total(sum(len(sample.ids) for group in batch.sampled for sample in group.samples))
        return {
            "step": step + 1,
            **measured,
            **learned,
            "tokens_per_second": sampled / seconds,
            "seconds": seconds,
            "seconds_by_activity": {name: value for name, value in spent.items() if value > 0},
            "usd_so_far": totals.usd,
            "cursor": state["cursor"],
        }

    train(
        folder,
        stage.steps,
        weights,
        state,
        one_step,
        meter=meter,
        checkpoint_every=stage.checkpoint_every,
        progress=progress,
    )
