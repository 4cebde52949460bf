"""Reinforcement learning with verifiable rewards as a stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from farthing.base.device import Ranks
from farthing.base.figures import plural
from farthing.base.heap import give_back
from farthing.cost.meter import Meter
from farthing.data.overlap import HeldOut
from farthing.data.tokenizer import question_ids
from farthing.engine import Model
from farthing.recipe import Grpo
from farthing.stages.at import At
from farthing.tasks import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.train.alarms import Watch
from farthing.train.grpo import Learner
from farthing.train.loop import Progress, train
from farthing.train.optim import MasterWeights, add_lora
from farthing.train.rollout import Roller

_MANY_FAILED = 0.01  # share of a step's rewards
_SPARE = 16  # tokens that a template or a tokenizer may add around a question


def run(spec: Grpo, start: Path | None, at: At) -> Path:
    """As `stages.Kind.run`."""
    assert start is not None
    model = at.load(start, spec.chat_template)
    at.say(
        f"{at.folder.name}: {plural(spec.steps, 'step')} of {plural(spec.prompts, 'question')} x {spec.group} answers"
    )
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
    return at.finish(model, spec.steps, start=start, merged=bool(spec.lora))


def _fitting(stage: Grpo, model: Model, cache: int, progress: Progress) -> Callable[[Item], bool]:
    """Whether a question of data, which may have any length, leaves room for an answer; the first that does not is
    said."""
    most = min(model.decoder.config.max_positions, cache) - stage.max_new_tokens
    around = len(question_ids(model.tokenizer, "", stage.prompt, stage.system))
    said = False

    def fits(item: Item) -> bool:
        nonlocal said
        # most questions are short: a token has at least a byte, so they need not be counted
        at_most = around + len(f"{item.asked}{item.system or ''}".encode()) + _SPARE
        if item.metadata["scorer"] != "rewards" or at_most <= most:
            return True
        length = len(question_ids(model.tokenizer, item.asked, stage.prompt, item.system or stage.system))
        if length > most and not said:
            progress.warn(
                f"a question of {item.task} has {length:,} tokens, and beside max_new_tokens there is room for "
                f"{most:,}: such questions are skipped"
            )
            said = True
        return length <= most

    return fits


def train_grpo(
    stage: Grpo,
    model: Model,
    folder: Path,
    *,
    seed: int,
    held_out: HeldOut,
    pool: VerifierPool,
    meter: Meter,
    ranks: Ranks,
    progress: Progress,
) -> None:
    """Train `model` in place; metrics and checkpoints go to `folder`. A killed run continues from its checkpoint.

    Args:
        held_out: the questions that must never be trained on.

    Raises:
        Diverged: when the gradient is broken, or sampler and trainer disagree.
        NothingToLearn: when none of the first steps had signal.
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
    stream = Mixture(stage.tasks, seed).stream(held_out, _fitting(stage, model, engine.capacity, progress))
    roller = Roller(stage, model, engine, stream, pool, meter, seed, ranks)
    state, judges = {"cursor": 0}, pool.asking.judges
    learner = Learner(stage, decoder, reference, weights, model.hf_config, meter, ranks)
    watch = Watch(progress.warn, stage.stop_silent)

    def one_step(step: int) -> dict[str, Any]:
        watch.check()
        started, before = time.monotonic(), dict(meter.totals().seconds)
        batch, state["cursor"] = roller.collect(step, state["cursor"])
        measured = batch.metrics(ranks)
        if measured["timeout"]:
            progress.warn(
                f"step {step + 1}: {measured['timeout']:.1%} of the answers could not be judged in time, in two tries, "
                "and earn nothing; is the machine busy?"
            )
        if measured["error"] >= _MANY_FAILED:
            progress.warn(
                f"step {step + 1}: the reward failed for {measured['error']:.1%} of the answers, which train nothing: "
                f"{batch.failed[0] if batch.failed else ''}"
            )
        give_back()  # what the answers took, in pieces too small for learning
        learned = learner.learn(batch, step)
        seconds, totals = time.monotonic() - started, meter.totals()
        spent = {name: value - before.get(name, 0.0) for name, value in totals.seconds.items()}
        sampled = ranks.total(sum(len(sample.ids) for group in batch.sampled for sample in group.samples))
        line = {
            "step": step + 1,
            **measured,
            **learned,
            **({"judge_calls": judges.calls, "judge_usd": judges.usd} if judges.calls else {}),
            "tokens_per_second": sampled / seconds,
            "seconds": seconds,
            "seconds_by_activity": {name: value for name, value in spent.items() if value > 0},
            "usd_so_far": totals.usd,
            "cursor": state["cursor"],
        }
        watch.see(line)
        return line

    def recall(line: dict[str, Any]) -> None:
        progress.recall(line)
        watch.recall(line)

    train(
        folder,
        stage.steps,
        weights,
        state,
        one_step,
        meter=meter,
        checkpoint_every=stage.checkpoint_every,
        progress=replace(progress, recall=recall),
    )
