"""From the work of a recipe's stages to seconds, FLOPs and memory.

A stage of reinforcement learning samples, judges and trains; its time depends on the length of answers and on how
many groups of answers disagree, which is unknown beforehand. `MEASURED` has what was observed; the low and high ends
of a plan halve and double it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from farthing.base.errors import UserError
from farthing.cost.devices import Device
from farthing.cost.flops import Recompute, causal_pairs, forward_flops, parameters
from farthing.cost.memory import Layout, Memory, check_latent, code_of, memory, precision_of, tokens_per_pass
from farthing.plans.speed import Speed
from farthing.recipe import Recipe
from farthing.recipe.work import EVALUATED_AT_ONCE, Answers, Config, Guess, StageWork

JUDGE = 5e-5  # seconds an answer, with three runs of the quickstart recipe, 2026-11-23
START = 2.3  # seconds of starting and of making the verifiers, in the same runs
LOADED = 80e6  # bytes a second of reading, hashing and building a model, in the same runs
LESSON = (
    1.7e-4  # a worked solution: drawn, written and made into tokens; 60,000 of tiny-deepseek's, 2026-11-27
)
_JUDGED = 8192  # tokens of a pass of a model that judges answers
LORA_SHARE = 2 / 3  # of training's time under LoRA: no gradient of the weights

MEASURED = Guess(
    answer=0.40,
    kept=0.25,
    prompt=50,
    source="means of a run of the quickstart recipe, seed 0, 2026-11-26 (docs/log.md)",
)
LARGER = 1e9  # parameters from which answers are guessed as below
PUBLISHED = Guess(
    answer=0.55,
    kept=1.0,
    prompt=50,
    source="DeepScaleR-1.5B: answers of 5,500 falling to 3,500 of 8,192 tokens (its blog of 2025-02, read in a "
    "summary); no share of groups was published, so all",
)


@dataclass(frozen=True)
class Sharing:
    """How devices share a recipe's work. Several of them need another trainer than ours: one that may compute layers
    again, or make its loss in one kernel."""

    layout: Layout = field(default_factory=Layout)
    recompute: Recompute = "none"
    fused_loss: bool = False

    @property
    def devices(self) -> int:
        return self.layout.devices


ALONE = Sharing()


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
    recipe: Recipe,
    base: Config | None,
    speed: Speed,
    device: Device,
    guess: Guess = MEASURED,
    asked: Sequence[Config] = (),
    sharing: Sharing = ALONE,
) -> tuple[tuple[StagePlan, ...], Config]:
    """The stages of a recipe, with loading before and evaluation around them, and the config of the network
    they end with; `base` is the base's config, `asked` are those of the models that judge answers. Devices share the
    work evenly.

    Raises UserError for data whose size is not known, and as `check_latent`, `check_shares` and the dial.
    """
    plans = [_start(base)]
    config = base
    works: list[StageWork] = []
    for number, stage in enumerate(recipe.stages, 1):
        if config is not None:
            check_latent(config)
        work = stage.work(config, guess)
        if stage.asks:
            work = replace(work, beside=tuple(asked))
        check_shares(number, work, sharing.devices)
        works.append(work)
        plans.append(_stage(f"{number:02d}-{stage.kind}", work, speed, device, sharing))
        config = work.config
    assert config is not None
    if recipe.evaluate is not None:
        plans.append(_evaluate(recipe, works, config, speed, guess, sharing.devices))
    return tuple(plans), config


def published_guess(config: Config | None) -> Guess:
    """What runs showed of models of this size; tasks differ more than that says."""
    return PUBLISHED if config is not None and parameters(config).total >= LARGER else MEASURED


def check_shares(number: int, work: StageWork, count: int) -> None:
    """Raises UserError for more devices than a step of the stage has sequences."""
    rows = work.sampling.answers if work.sampling else math.ceil(work.tokens / work.length)
    if count > rows:
        raise UserError(
            f"--count {count}: a step of stage {number} has {rows} sequences, one for each device at most; lower it"
        )


def halved_and_doubled(guess: Guess) -> tuple[Guess, Guess]:
    """The low and high ends of the assumptions; a length that is known stays."""
    return (
        replace(guess, answer=guess.answer / 2, kept=guess.kept / 2),
        replace(guess, answer=min(1.0, guess.answer * 2), kept=min(1.0, guess.kept * 2)),
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


def _start(base: Config | None) -> StagePlan:
    seconds = START + (2 * parameters(base).total / LOADED if base else 0.0)
    return StagePlan("00-base", {"load": seconds}, 0.0, 0.0, Memory())


def _stage(name: str, whole: StageWork, speed: Speed, device: Device, sharing: Sharing) -> StagePlan:
    """The seconds and memory of a device's share of a stage's work, and the FLOPs of all of it."""
    count = sharing.devices
    work = _shared(whole, count)
    again = float(sharing.recompute == "full")  # the forward pass
    steps = work.steps * work.training_steps
    # The passes of a step share its fixed costs, so a step is timed whole.
    one = speed.train(work.config, work.tokens, work.pairs, work.scored) * (work.forwards + again) / 3
    one = one * (LORA_SHARE if work.lora else 1)
    one += work.updates * speed.optimizer(work.trained / count, work.muon_flops / count)
    forward = forward_flops(work.config, round(work.tokens), round(work.pairs), round(work.scored))
    seconds = {"train": steps * one, "checkpoint": _saves(work, speed) / count}
    if work.lessons:
        seconds["load"] = work.lessons * LESSON
    flops = steps * work.forwards * forward
    if work.sampling is not None:
        rounds = work.steps * work.sampling.rounds
        generate, sampled = sampling_work(work.sampling, work.config, speed)
        seconds["generate"] = rounds * generate
        seconds["verify"] = START / 10 + rounds * work.sampling.answers * JUDGE
        flops += rounds * sampled
        for config in work.beside:
            taken, read = _judging(work.sampling, config, speed)
            seconds["judge"] = seconds.get("judge", 0.0) + rounds * taken
            flops += rounds * read
    held = training_memory(work, device.kind, speed.dtype, sharing)
    return StagePlan(name, seconds, count * flops, steps * whole.tokens, held)


def _shared(work: StageWork, count: int) -> StageWork:
    """One of `count` devices' share of a stage's steps."""
    if count == 1:
        return work
    like = work.sampling
    return replace(
        work,
        tokens=work.tokens / count,
        pairs=work.pairs / count,
        scored=work.scored / count,
        cache_tokens=math.ceil(work.cache_tokens / count),
        sampling=like
        and replace(
            like, questions=math.ceil(like.questions / count), answers=math.ceil(like.answers / count)
        ),
    )


def sampling_work(like: Answers, config: Config, speed: Speed) -> tuple[float, float]:
    """Seconds and FLOPs of one round of answers on one device."""
    steps = decoding_steps(like.answers, like.at_once, like.mean, like.longest)
    context = like.prompt + like.mean / 2
    more = max(0.0, like.mean - 1)  # the first token of each comes with the prompt
    rows = like.answers * more / max(1.0, steps - 1)
    own = like.questions * causal_pairs(round(like.prompt))
    read = like.questions * like.prompt
    waves = math.ceil(like.answers / like.at_once)
    first = waves * speed.prefill(config, read / waves, own / waves, like.questions / waves)
    seconds = first + max(0.0, steps - 1) * speed.decode(config, rows, context)
    sampled = round(like.answers * more)
    work = forward_flops(config, round(read), own, like.questions)
    work += forward_flops(config, sampled, round(like.answers * more * context), sampled)
    return seconds, work


def _judging(like: Answers, config: Config, speed: Speed) -> tuple[float, float]:
    """Seconds and FLOPs of a model that reads one round of answers, each after its question."""
    length = like.prompt + like.mean
    tokens, pairs = like.answers * length, like.answers * causal_pairs(round(length))
    return speed.prefill(config, tokens, pairs, 0.0), forward_flops(config, round(tokens), pairs, 0)


def _evaluate(
    recipe: Recipe, stages: Sequence[StageWork], config: Config, speed: Speed, guess: Guess, count: int
) -> StagePlan:
    """The held-out questions, before and after, and the subset during; a model from nothing without rewards is asked
    only after."""
    settings, asks = recipe.evaluate, recipe.asks()
    assert settings is not None
    trained = [stage.asks.max_new_tokens for stage in recipe.stages if stage.asks]
    natural = guess.answer_tokens(trained[-1] if trained else asks.max_new_tokens)
    rounds = {settings.held_out: 2.0 if recipe.base is not None or trained else 1.0}
    if settings.every is not None:
        every = settings.every
        asked = sum(math.ceil(work.steps / every) for spec, work in zip(recipe.stages, stages, strict=True)
                    if not spec.starts_from_nothing)  # fmt: skip
        rounds[settings.subset] = rounds.get(settings.subset, 0.0) + asked
    seconds = flops = 0.0
    for questions, times in rounds.items():
        answers = Answers(
            questions=math.ceil(questions / count),
            answers=math.ceil(questions * settings.samples / count),
            at_once=EVALUATED_AT_ONCE,
            prompt=guess.prompt_tokens(asks.system),
            mean=max(1.0, min(natural, asks.max_new_tokens)),
            longest=asks.max_new_tokens,
        )
        once, work = sampling_work(answers, config, speed)
        seconds += times * (once + answers.answers * JUDGE)
        flops += count * times * work
    return StagePlan("99-final", {"evaluate": seconds}, flops, 0.0, Memory())


def _saves(work: StageWork, speed: Speed) -> float:
    """Seconds of the checkpoints, master copies and two moments in float32, and of the finished model."""
    model = speed.write(2 * parameters(work.config).total)
    return math.ceil(work.steps / work.save_every) * speed.write(12 * work.trained) + model


def fitting_gb(work: StageWork, device_kind: str, dtype: str, room: float) -> float:
    """The largest `memory_gb` with which a stage's work fits in `room` bytes of a kind of device (`cpu`, `gpu`), to a
    thousandth; 0 if none does."""
    low, high = 1e-3, max(1e-3, room / 1e9)

    def fits(gb: float) -> bool:
        return training_memory(replace(work, memory_gb=gb), device_kind, dtype).total <= room

    if not fits(low):
        return 0.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def training_memory(work: StageWork, device_kind: str, dtype: str, sharing: Sharing = ALONE) -> Memory:
    """Memory of a device's share of a stage; float32 weights, activations and cache stand beside float32 masters."""
    code, precision = code_of(device_kind), precision_of(dtype)
    alone = sharing.devices == 1
    at_once = tokens_per_pass(
        work.config,
        work.memory_gb,
        length=work.length,
        precision=precision,
        code=code,
        kind=work.memory_kind,
        lora=work.lora,
    )
    answer = work.sampling.mean + work.sampling.prompt if work.sampling else 0
    beside = sum(judge_bytes(config, device_kind, dtype) for config in work.beside)
    found = memory(
        work.config,
        kind=work.memory_kind,
        micro_tokens=min(round(max(work.tokens, answer)), max(work.length, at_once if alone else 0)),
        seq_len=work.length,
        precision=precision,
        code=code if alone else "usual",
        layout=sharing.layout,
        recompute=sharing.recompute,
        fused_loss=sharing.fused_loss,
        lora_rank=work.lora,
        cache_tokens=work.cache_tokens or None,
        reference=work.reference,
    )
    return replace(found, weights=found.weights + beside)


def judge_bytes(config: Config, device_kind: str, dtype: str) -> int:
    """Bytes of a model that judges answers: its weights, and a pass over them."""
    tokens = min(_JUDGED, int(config.get("max_position_embeddings") or _JUDGED))
    need = memory(
        config, kind="serve", micro_tokens=_JUDGED, seq_len=tokens,
        precision=precision_of(dtype), code=code_of(device_kind),
    )  # fmt: skip
    return need.total - need.runtime
