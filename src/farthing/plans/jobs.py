"""One job of training a model that exists, and what it takes on some devices.

FLOPs are exact (`flops_per_token`), counted in forward passes: a full update costs three, one of adapters two, since
frozen weights have no gradient; a reference, a teacher, and the sampler's own probabilities one more each; and what
is recomputed. They run at the efficiency fitted on pretraining (`plans.efficiency`). Sampling takes the time of
decoding on one device (`plans.speed`). Memory is `cost.memory`'s, over the layouts of `plans.layout`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from farthing.base.figures import Range
from farthing.cost.devices import Device, peak
from farthing.cost.flops import Flops, flops_per_token, parameters
from farthing.cost.memory import cache_bytes_per_token, code_of
from farthing.plans.efficiency import conditions, efficiency
from farthing.plans.layout import USABLE, Candidate, Training, best
from farthing.plans.sampling import sampling_work
from farthing.plans.speed import Catalogued
from farthing.recipe.work import Answers

Method = Literal["pretrain", "full", "lora", "qlora", "dpo", "grpo", "distill"]
# Families that Farthing's trainer builds: weights.layouts.LAYOUTS, which needs torch.
BUILT = {
    "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe", "mixtral",
    "phi3", "gemma2", "gemma3_text", "olmo2", "olmo3", "gpt_oss",
}  # fmt: skip
GROUP = 8  # answers to a question, assumed
HOST_LINK = 32e9  # bytes a second to the host's memory: PCIe 4, one way


@dataclass(frozen=True)
class Job:
    """What is to be done, however it is laid out."""

    method: Method
    config: Mapping[str, Any]
    seq_len: int
    batch: int
    """Examples of a step: sequences, pairs of them (dpo), answers (grpo)."""
    steps: float
    tokens: float
    """Of all sequences."""
    training: Training
    precision: str
    answers: Answers | None = None
    """Sampled in a step, over all devices."""
    kept: float = 1.0
    """Share of the tokens that is trained on."""

    @property
    def mean(self) -> int:
        """Tokens of a sequence."""
        return max(1, round(self.tokens / (self.steps * self.batch * self.training.rows)))


@dataclass(frozen=True)
class Option:
    """A job on some devices: what it needs, and what it takes if it fits."""

    change: str
    """From what was asked; empty for that itself."""
    keeps_method: bool
    device: Device
    count: int
    candidate: Candidate
    """The fastest layout that fits, or the one that needs least."""
    fits: bool
    here: bool
    """Farthing's own trainer runs it."""
    device_hours: Range
    usd: Range | None

    def as_json(self) -> dict[str, Any]:
        return {
            "change": self.change or None,
            "device": self.device.name,
            "count": self.count,
            "fits": self.fits,
            "farthing_runs_it": self.here,
            "memory_bytes_per_device": self.candidate.memory_bytes,
            "layout": self.candidate.as_json(),
            "device_hours": self.device_hours.as_json(),
            "usd": None if self.usd is None else self.usd.as_json(),
        }


def option(
    job: Job, device: Device, count: int, price: float | None, change: str = "", keeps: bool = True
) -> Option:
    """The job on these devices, at dollars a device-hour if they are known: by Farthing's own trainer where that can
    do it, else by another."""
    batch_tokens = float(job.batch * job.training.rows * job.seq_len)

    def tried(training: Training) -> tuple[list[Candidate], Candidate]:
        return best(job.config, device, count, job.seq_len, batch_tokens, training)

    fitting, least = tried(job.training)
    here = False
    if not elsewhere(job, count):
        own, _ = tried(replace(job.training, code=code_of(device.kind)))
        here = bool(own)
        fitting = own or fitting
    candidate = fitting[0] if fitting else least
    hours = _device_hours(job, device, count, candidate)
    usd = None if price is None else hours.times(price)
    return Option(change, keeps, device, count, candidate, bool(fitting), here, hours, usd)


def elsewhere(job: Job, count: int) -> str:
    """Why Farthing cannot run the job itself, as the rest of a sentence; empty if it can, where memory allows."""
    training = job.training
    if job.method == "dpo":
        return "has no preference optimisation"
    if job.method == "grpo":
        return "runs GRPO from a recipe, and plans it so"
    if training.teacher is not None:
        return "learns from a teacher's text, not its logits"
    if count > 1:
        return "trains on one device"
    if training.base_bits != 16:
        return "trains beside weights of 16 bits only"
    if training.optimizer == "adamw-8bit" or training.precision == "pure-bf16" or training.offload:
        return "keeps master copies and moments in float32, on the device"
    if (family := str(job.config.get("model_type"))) not in BUILT:
        return f"builds no {family}"
    return ""


def _device_hours(job: Job, device: Device, count: int, candidate: Candidate) -> Range:
    per_token = flops_per_token(job.config, job.mean, mtp=False, recompute=candidate.recompute)
    reached = efficiency(conditions(job.config, per_token, device, count, seq_len=job.seq_len))
    work = job.kept * job.tokens * _work(job, per_token) / (peak(device) * 3600)
    fixed = (_sampling_hours(job, device, count, candidate) + _offload_hours(job, candidate)) * count
    u = Catalogued(device).uncertainty
    return Range(
        work / reached.high + fixed / u, work / reached.likely + fixed, work / reached.low + fixed * u
    )


def _work(job: Job, per_token: Flops) -> float:
    """FLOPs of a token that is trained on."""
    forward = per_token.model / 3
    passes = 2 if job.training.lora_rank else 3
    # a reference's pass: of the frozen copy, or of the model without its adapters; then the sampler's probabilities,
    # which trainers compute again
    passes += (job.method in ("dpo", "grpo")) + (job.method == "grpo")
    found = passes * forward + per_token.recompute
    if job.training.teacher is not None:
        found += flops_per_token(job.training.teacher, job.mean, "forward", mtp=False).model
    return found


def _sampling_hours(job: Job, device: Device, count: int, candidate: Candidate) -> float:
    """Hours of sampling all answers, each device its share."""
    if job.answers is None:
        return 0.0
    share = math.ceil(job.answers.answers / count)
    held = candidate.held
    sampler = 0 if held.cache else 2 * parameters(job.config).total / candidate.layout.tensor
    room = USABLE * device.memory_bytes - held.weights - held.gradients - held.optimizer - sampler
    at_once = max(1, min(share, int(room // (job.seq_len * cache_bytes_per_token(job.config)))))
    own = replace(job.answers, questions=math.ceil(share / GROUP), answers=share, at_once=at_once)
    seconds, _ = sampling_work(own, job.config, Catalogued(device))
    return job.steps * seconds / 3600


def _offload_hours(job: Job, candidate: Candidate) -> float:
    """Hours of moving gradients to the host and weights back, once a step; what the host computes hides behind it."""
    if not job.training.offload or job.training.lora_rank:
        return 0.0
    layout = candidate.layout
    moved = 4 * parameters(job.config).total / (layout.tensor * layout.sharding)
    return job.steps * moved / HOST_LINK / 3600
