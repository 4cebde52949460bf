"""The work of a recipe's stages and the seconds it takes, with what answers are likely to look like.

A stage of reinforcement learning samples, judges and trains; how long depends on how long the answers get and
on how many groups of answers disagree, which nobody knows before. `MEASURED` says what was seen; the low and
high ends of the plan halve and double it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.cost.devices import Device
from farthing.cost.flops import causal_pairs, forward_flops, mtp_flops, parameters
from farthing.cost.memory import Code, Kind, Memory, check_latent, memory
from farthing.cost.shapes import shapes
from farthing.plans.speed import PRECISION, Config, Speed
from farthing.recipe import Grpo, Pretrain, Recipe, Sft

TRAINED_AT_ONCE = 64  # sequences that `train.grpo` samples at a time
EVALUATED_AT_ONCE = 48
JUDGE = 5e-5  # seconds an answer, with three runs of the quickstart recipe, 2026-11-23
START = 2.3  # seconds of starting and of making the verifiers, in the same runs
LOADED = 80e6  # bytes a second of reading, hashing and building a model, in the same runs
BYTES_A_TOKEN = 4  # of English text


@dataclass(frozen=True)
class Behaviour:
    """What a plan has to guess of a model's answers."""

    answer: float
    """Mean length of an answer, as a share of the longest that training allows."""
    kept: float
    """Share of the groups whose answers do not all earn the same; the others are not trained on."""
    prompt: float
    """Tokens of a question in its template."""


MEASURED = Behaviour(answer=0.40, kept=0.25, prompt=50)
MEASURED_SOURCE = "means of a run of the quickstart recipe, seed 0, 2026-11-26 (docs/log.md)"


@dataclass(frozen=True)
class StagePlan:
    """Seconds by activity, and the work in them."""

    name: str
    seconds: Mapping[str, float]
    flops: float
    tokens: float
    """Trained on."""
    memory: Memory


def plan_stages(
    recipe: Recipe, base: Config | None, speed: Speed, device: Device, behaviour: Behaviour = MEASURED
) -> tuple[tuple[StagePlan, ...], Config]:
    """The stages of a recipe, with loading before and evaluation around them, and the config of the network
    they end with; `base` is the base's config.

    Raises UserError for data whose size is not known, and as `check_latent` and the dial.
    """
    plans = [_start(base)] if base else []
    config = base
    for number, stage in enumerate(recipe.stages, 1):
        if isinstance(stage, Pretrain):
            found, config = _pretrain(stage, speed, device)
        else:
            assert config is not None
            check_latent(config)
            if isinstance(stage, Sft):
                found = _sft(stage, config, speed, device)
            else:
                found = _grpo(stage, config, speed, device, behaviour)
        plans.append(replace(found, name=f"{number:02d}-{stage.kind}"))
    assert config is not None
    if recipe.evaluate is not None:
        plans.append(_evaluate(recipe, config, speed, behaviour))
    return tuple(plans), config


def halved_and_doubled(behaviour: Behaviour) -> tuple[Behaviour, Behaviour]:
    """The ends of what answers may be like."""
    return (
        replace(behaviour, answer=behaviour.answer / 2, kept=behaviour.kept / 2),
        replace(behaviour, answer=min(1.0, behaviour.answer * 2), kept=min(1.0, behaviour.kept * 2)),
    )


def survival(mean: float, longest: int) -> float:
    """q such that answers which go on with probability q after each token, and end at `longest`, have this mean
    length: sum of q^k for k < longest."""
    if mean >= longest:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        q = (low + high) / 2
        if (1 - q**longest) / (1 - q) < mean:
            low = q
        else:
            high = q
    return q


def decoding_steps(answers: int, at_once: int, mean: float, longest: int) -> float:
    """Passes that sampling takes: full batches while answers wait, then until the longest of the last ends."""
    q = survival(mean, longest)
    last = min(answers, at_once)
    tail = sum(1 - (1 - q**k) ** last for k in range(longest))
    return max(0, answers - at_once) * mean / at_once + tail


# ---- stages ----


def _start(config: Config) -> StagePlan:
    seconds = START + 2 * parameters(config).total / LOADED
    return StagePlan("00-base", {"load": seconds}, 0.0, 0.0, Memory())


def _grpo(stage: Grpo, config: Config, speed: Speed, device: Device, like: Behaviour) -> StagePlan:
    answers, longest = stage.prompts * stage.group, stage.max_new_tokens
    mean = max(1.0, like.answer * longest)
    prompt = like.prompt + len(stage.system or "") / BYTES_A_TOKEN
    rounds = min(1 + stage.refill, 1 / like.kept) if stage.refill else 1
    generate, sampled = _sampling(
        config, speed, stage.prompts, answers, TRAINED_AT_ONCE, prompt, mean, longest
    )
    kept = like.kept if stage.drop_silent else 1.0
    groups = min(stage.prompts, kept * stage.prompts * rounds)
    some = 1 - (1 - min(1.0, kept)) ** stage.prompts  # a step in which no group is kept trains nothing
    tokens = groups * (prompt + stage.group * mean)
    own = causal_pairs(round(prompt))
    pairs = groups * (own + stage.group * (mean * prompt + causal_pairs(round(mean))))
    scored = groups * stage.group * mean
    # The passes of a step share its fixed costs; it is as long as the groups it has are many.
    one = speed.train(config, tokens / some, pairs / some, scored / some)
    counted = parameters(config).total
    trained = _lora_size(config, stage.lora) if stage.lora else counted
    factor = (1 + bool(stage.kl) / 3) * (2 / 3 if stage.lora else 1)
    train = some * (one * factor + stage.updates * speed.optimizer(trained))
    forward = forward_flops(config, round(tokens), round(pairs), round(scored))
    return StagePlan(
        name="",
        seconds={
            "generate": stage.steps * rounds * generate,
            "verify": START / 10 + stage.steps * rounds * answers * JUDGE,
            "train": stage.steps * train,
            "checkpoint": _saves(stage.steps, stage.checkpoint_every, counted, trained, speed),
        },
        flops=stage.steps * (rounds * sampled + (3 + bool(stage.kl)) * forward),
        tokens=stage.steps * tokens,
        memory=_memory(
            stage,
            config,
            device,
            speed.dtype,
            round(max(tokens / some, mean + prompt)),
            round(prompt + longest),
            cache=TRAINED_AT_ONCE * (longest + 32) + stage.prompts * 1024,
        ),
    )


def _sampling(
    config: Config,
    speed: Speed,
    prompts: int,
    answers: int,
    at_once: int,
    prompt: float,
    mean: float,
    longest: int,
) -> tuple[float, float]:
    """Seconds and FLOPs of answering `prompts` questions `answers` times in all."""
    steps = decoding_steps(answers, at_once, mean, longest)
    context = prompt + mean / 2
    more = max(0.0, mean - 1)  # the first token of each comes with the prompt
    rows = answers * more / max(1.0, steps - 1)
    own = prompts * causal_pairs(round(prompt))
    waves = math.ceil(answers / at_once)
    first = waves * speed.prefill(config, prompts * prompt / waves, own / waves, prompts / waves)
    seconds = first + max(0.0, steps - 1) * speed.decode(config, rows, context)
    work = forward_flops(config, round(prompts * prompt), own, prompts)
    work += forward_flops(
        config, round(answers * more), round(answers * more * context), round(answers * more)
    )
    return seconds, work


def _evaluate(recipe: Recipe, config: Config, speed: Speed, like: Behaviour) -> StagePlan:
    """The held-out questions, before and after; a model from nothing without rewards is asked after alone."""
    settings, asks = recipe.evaluate, recipe.asks()
    assert settings is not None
    stages = [stage.max_new_tokens for stage in recipe.stages if isinstance(stage, Grpo)]
    natural = like.answer * (stages[-1] if stages else asks.max_new_tokens)
    prompt = like.prompt + len(asks.system or "") / BYTES_A_TOKEN
    n = settings.held_out
    seconds, flops = _sampling(
        config,
        speed,
        n,
        n,
        EVALUATED_AT_ONCE,
        prompt,
        max(1.0, min(natural, asks.max_new_tokens)),
        asks.max_new_tokens,
    )
    rounds = 2 if recipe.base is not None or stages else 1
    return StagePlan("99-final", {"evaluate": rounds * (seconds + n * JUDGE)}, rounds * flops, 0.0, Memory())


def _pretrain(stage: Pretrain, speed: Speed, device: Device) -> tuple[StagePlan, Config]:
    from farthing.recipe.dial import dial

    dialled = dial(stage, stage.vocab_size)
    plan = _language_model(stage, dialled.config, dialled.steps, dialled.batch_tokens, speed, device)
    return plan, dialled.config


def _sft(stage: Sft, config: Config, speed: Speed, device: Device) -> StagePlan:
    size = sum(_source_tokens(source) * source.weight for source in stage.data)
    steps = stage.steps or max(1, math.ceil(size * stage.epochs / stage.batch_tokens))
    return _language_model(stage, config, steps, stage.batch_tokens, speed, device)


def _language_model(
    stage: Pretrain | Sft, config: Config, steps: int, batch: int, speed: Speed, device: Device
) -> StagePlan:
    rows = max(1, batch // stage.length)
    pairs = rows * causal_pairs(stage.length)
    counted = parameters(config)
    rank = stage.lora if isinstance(stage, Sft) else None
    trained = _lora_size(config, rank) if rank else counted.total
    forward = forward_flops(config, batch, pairs, batch)
    more = 1 + mtp_flops(config, batch, pairs, batch) / forward  # prediction modules, at the same pace
    one = speed.train(config, batch, pairs, batch) * more * (2 / 3 if rank else 1) + speed.optimizer(trained)
    return StagePlan(
        name="",
        seconds={
            "train": steps * one,
            "checkpoint": _saves(steps, stage.checkpoint_every, counted.total, trained, speed),
        },
        flops=3 * steps * forward * more,
        tokens=steps * batch,
        memory=_memory(stage, config, device, speed.dtype, batch, stage.length),
    )


def _source_tokens(source: Any) -> float:
    """Tokens of a source of conversations: of its file, or of as many worked solutions as it asks for."""
    if source.path is None:
        return float(source.items) * 2 * MEASURED.prompt
    path = Path(source.path)
    if not path.exists():
        raise UserError(
            f"{source.path}: its size is not known here; give steps: in the stage, or a local path"
        )
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) / BYTES_A_TOKEN


def _saves(steps: int, every: int, counted: float, trained: float, speed: Speed) -> float:
    """Seconds of the checkpoints, master copies and two moments in float32, and of the finished model."""
    return math.ceil(steps / every) * speed.write(12 * trained) + speed.write(2 * counted)


def _memory(
    stage: Grpo | Sft | Pretrain,
    config: Config,
    device: Device,
    dtype: str,
    tokens: int,
    length: int,
    cache: int = 0,
) -> Memory:
    """Of a stage on a device; with float32, weights, activations and cache are of 4 bytes, beside float32 masters."""
    rank = getattr(stage, "lora", None) or 0
    kind: Kind = "lora" if rank and not isinstance(stage, Grpo) else stage.kind
    code: Code = "farthing-cpu" if device.kind == "cpu" else "farthing-gpu"
    precision = PRECISION[dtype]
    some = memory(
        config, kind="pretrain", micro_tokens=length, seq_len=length, precision=precision, code=code
    )
    each = max(1.0, some.activations / length)
    at_once = max(length, int(stage.memory_gb * 1e9 / each))
    return memory(
        config,
        kind=kind,
        micro_tokens=min(tokens, at_once),
        seq_len=length,
        precision=precision,
        code=code,
        lora_rank=rank,
        cache_tokens=cache or None,
        reference=bool(getattr(stage, "kl", 0)),
    )


def _lora_size(config: Config, rank: int | None) -> float:
    """Trained parameters under LoRA: rank times inputs and outputs of every matrix in the layers."""
    return sum(
        (rank or 0) * (m.inputs + m.outputs) * m.count
        for layer in shapes(config).layers
        for m in layer.matrices
        if m.role in ("attention", "feedforward")
    )
