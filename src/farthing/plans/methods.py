"""Plans of any way to train a model that exists: what is asked, what it takes, and what would fit.

Farthing runs few of these itself: a plan says what of it another trainer has to run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from farthing.base.errors import UserError
from farthing.base.figures import Range, bytes_, duration, letters, money, percent, range_text
from farthing.base.schema import nearest
from farthing.cost import devices
from farthing.cost.devices import Device
from farthing.cost.flops import Parameters, parameters
from farthing.cost.memory import Optimizer, check_latent
from farthing.cost.shapes import shapes
from farthing.plans.jobs import GROUP, Job, Method, Option, elsewhere, option
from farthing.plans.layout import USABLE, Training
from farthing.plans.sampling import published_guess
from farthing.plans.training import (
    SEQ_LEN,
    Assumption,
    alias,
    check_batch,
    check_context,
    check_count,
    check_precision,
    checked_price,
    known_context,
    memory_precision,
)
from farthing.recipe.work import Answers

METHODS: tuple[Method, ...] = get_args(Method)
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
RANK = 16  # of adapters, if none is given
PROMPT = 256  # tokens of a question, assumed
_MOST_TIMES = 64  # as many devices that a change may ask for
_MOST_DEVICES = 3  # larger ones that are listed


@dataclass(frozen=True)
class MethodPlan:
    """A plan for training a model by some method."""

    name: str
    job: Job
    asked: Option
    changes: tuple[Option, ...]
    """Of what was asked, each by itself; those that fit come first, the cheapest of them at the top."""
    parameters: Parameters
    price: float | None
    price_source: str
    assumptions: tuple[Assumption, ...]

    @property
    def fits(self) -> bool:
        return self.asked.fits

    @property
    def remedy(self) -> str:
        """If it does not fit, the cheapest change that makes it: one that keeps the method, if there is one."""
        if self.fits:
            return ""
        fitting = [each for each in self.changes if each.fits]
        kept = [each for each in fitting if each.keeps_method] or fitting
        return kept[0].change if kept else "take a smaller model"

    @property
    def least_bytes(self) -> float:
        return self.asked.candidate.memory_bytes

    @property
    def device(self) -> Device:
        return self.asked.device

    @property
    def count(self) -> int:
        return self.asked.count

    @property
    def wall_hours(self) -> Range:
        return self.asked.device_hours.times(1 / self.count)

    def as_json(self) -> dict[str, Any]:
        """The plan as `farthing plan --json` prints it."""
        job, training = self.job, self.job.training
        return {
            "name": self.name,
            "method": job.method,
            "precision": job.precision,
            "optimizer": training.optimizer,
            "lora": training.lora_rank or None,
            "base_bits": training.base_bits,
            "seq_len": job.seq_len,
            "batch": job.batch,
            "steps": job.steps,
            "tokens": job.tokens,
            "params_total": self.parameters.total,
            "params_active": self.parameters.active,
            **self.asked.as_json(),
            "memory": self.asked.candidate.held.parts(),
            "memory_bytes_of_device": self.device.memory_bytes,
            "wall_hours": self.wall_hours.as_json(),
            "usd_per_device_hour": self.price,
            "price_source": self.price_source,
            "remedy": self.remedy or None,
            "changes": [each.as_json() for each in self.changes],
            "assumptions": [asdict(assumption) for assumption in self.assumptions],
        }


def plan_method(
    config: Mapping[str, Any],
    method: Method,
    *,
    device: Device,
    count: int | None = None,
    seq_len: int | None = None,
    batch: int | None = None,
    optimizer: Optimizer = "adamw",
    precision: str = "bf16",
    tokens: float | None = None,
    examples: int | None = None,
    steps: int | None = None,
    lora: int | None = None,
    fused_loss: bool = False,
    offload: bool = False,
    teacher: Mapping[str, Any] | None = None,
    answer_length: float | None = None,
    kept: float | None = None,
    price: float | None = None,
    name: str = "",
) -> MethodPlan:
    """Plan training a model that exists, and the same with each change that might make it fit.

    Args:
        method: any but `pretrain`, which is `plan_training`'s.
        count: devices; None takes one.
        seq_len: tokens of the longest sequence; None takes 4,096, or the model's context if less.
        batch: examples of a step: sequences, pairs (dpo) or answers (grpo); None takes 16, or a device's one each.
        tokens, examples, steps: how much is trained on; one of them, or tokens of so many examples.
        lora: rank of adapters; None takes 16 for lora and qlora, and all weights otherwise.
        teacher: config.json of a frozen model whose logits are learned (distill); None learns from its text.
        answer_length: mean tokens of a sampled answer (grpo).
        kept: share of the groups that are trained on (grpo).

    Raises UserError for a job that makes no sense, by the option that is wrong.
    """
    check_count(count)
    check_precision(precision, device)
    check_latent(config)
    count = count or 1
    if seq_len is None:
        seq_len = min(SEQ_LEN, known_context(config) or SEQ_LEN)
    batch = max(16, count) if batch is None else batch
    for flag, value in (("--seq-len", seq_len), ("--batch", batch), ("--lora", lora)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    check_context(config, seq_len)
    check_batch(batch, count)
    training = _training(config, method, optimizer, precision, lora, fused_loss, offload, teacher, seq_len)
    answers = _answers(config, method, batch, seq_len, answer_length, kept)
    mean = None if answers is None else answers.prompt + answers.mean
    sequences, all_tokens = _amount(tokens, examples, steps, batch, seq_len, training.rows, mean)
    job = Job(
        method, config, seq_len, batch, sequences / batch, all_tokens, training, precision, answers,
        1.0 if kept is None else kept,
    )  # fmt: skip
    paid, source = checked_price(device, price)
    asked = option(job, device, count, paid)
    changes = _changes(job, asked, price)
    return MethodPlan(
        name=name or str(config.get("model_type")),
        job=job,
        asked=asked,
        changes=tuple(sorted(changes, key=_cost)),
        parameters=parameters(config),
        price=paid,
        price_source=source,
        assumptions=tuple(_assumptions(job, asked)),
    )


def _training(
    config: Mapping[str, Any],
    method: Method,
    optimizer: Optimizer,
    precision: str,
    lora: int | None,
    fused_loss: bool,
    offload: bool,
    teacher: Mapping[str, Any] | None,
    seq_len: int,
) -> Training:
    if precision == "fp8":
        raise UserError(f"--precision fp8: is planned for pretraining only; leave it out for {method}")
    rank = lora or (RANK if method in ("lora", "qlora") else 0)
    if method == "full" and rank:
        raise UserError("--lora: full trains every weight; take --method lora")
    s = shapes(config)
    if rank and not _takes_adapters(config):
        raise UserError(
            f"--method {method}: jetmoe chooses among experts in attention and feed-forward, so LoRA finds no linear "
            "map but keys and values; take --method full"
        )
    if rank > s.width:
        raise UserError(f"--lora {rank}: more than the model's width of {s.width}; give less")
    if rank and optimizer == "muon":
        raise UserError(
            "--optimizer muon: orthogonalises whole matrices, not the factors of a LoRA; take adamw"
        )
    if teacher is not None:
        if method != "distill":
            raise UserError(f"--teacher: goes with --method distill, not {method}")
        if (theirs := shapes(teacher).vocab) != s.vocab:
            raise UserError(
                f"--teacher: its vocabulary has {theirs} tokens and the student's {s.vocab}, so their logits cannot be "
                "compared; leave --teacher out to learn from its text"
            )
    return Training(
        precision=memory_precision(precision),
        optimizer=optimizer,
        lora_rank=rank,
        base_bits=4 if method == "qlora" else 16,
        reference=method in ("dpo", "grpo") and not rank,  # without its adapters a model is its own reference
        fused_loss=fused_loss,
        offload=offload,
        from_nothing=False,
        rows=2 if method == "dpo" else 1,
        teacher=teacher,
        sampled=seq_len if method == "grpo" else 0,
    )


def _takes_adapters(config: Mapping[str, Any]) -> bool:
    """Whether there are linear maps for LoRA: not in JetMoE, whose attention is a mixture too."""
    return shapes(config).family != "jetmoe"


def _answers(
    config: Mapping[str, Any],
    method: Method,
    batch: int,
    seq_len: int,
    answer_length: float | None,
    kept: float | None,
) -> Answers | None:
    """The answers sampled in a step."""
    if method != "grpo":
        given = {"--answer-length": answer_length, "--kept": kept}
        for flag, value in given.items():
            if value is not None:
                raise UserError(f"{flag}: goes with --method grpo, not {method}")
        return None
    longest = seq_len - PROMPT
    if longest < 1:
        raise UserError(f"--seq-len {seq_len}: no room for an answer after a question of {PROMPT} tokens")
    mean = published_guess(config).answer * longest if answer_length is None else answer_length
    if not 1 <= mean <= longest:
        raise UserError(f"--answer-length {mean:g}: must be between 1 and {longest}, what --seq-len leaves")
    if kept is not None and not 0 < kept <= 1:
        raise UserError(f"--kept {kept:g}: must be a share above 0, at most 1")
    return Answers(math.ceil(batch / GROUP), batch, batch, PROMPT, mean, longest)


def _amount(
    tokens: float | None,
    examples: int | None,
    steps: int | None,
    batch: int,
    seq_len: int,
    rows: int,
    mean: float | None,
) -> tuple[float, float]:
    """Examples and tokens of the whole run; `mean` tokens a sequence, if that is known."""
    if sum(value is not None for value in (tokens, steps)) + (examples is not None and tokens is None) != 1:
        raise UserError(
            "say how much is trained on: one of --tokens, --examples and --steps, or --tokens of --examples"
        )
    for flag, value in (("--examples", examples), ("--steps", steps)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    each = rows * (mean or seq_len)
    if steps is not None:
        return float(steps * batch), steps * batch * each
    if tokens is None:
        assert examples is not None
        return float(examples), examples * each
    if examples is None:
        return tokens / each, tokens
    if tokens > examples * rows * seq_len:
        raise UserError(
            f"--tokens {tokens:g}: {tokens / examples / rows:,.0f} tokens for each of {examples} examples, more than "
            f"--seq-len {seq_len}; raise it"
        )
    return float(examples), tokens


# ---- what would fit ----


def _changes(job: Job, asked: Option, price: float | None) -> Iterator[Option]:
    """What was asked with one thing changed."""
    device, count = asked.device, asked.count
    paid, _ = checked_price(device, price)
    for change, other in _other_trainings(job.training, asked.here):
        yield option(replace(job, training=other), device, count, paid, change)
    for change, other in _lighter_trainings(job):
        yield option(replace(job, training=other), device, count, paid, change, keeps=False)
    more = 2 * count
    while more <= min(_MOST_TIMES * count, job.batch):
        found = option(job, device, more, paid, f"use {more} x {alias(device)}")
        if found.fits:
            yield found
            break
        more *= 2
    larger = [
        option(job, other, count, other.prices[0].usd, f"use {count} x {alias(other)}")
        for other in devices.catalogue()
        if other.kind == "gpu" and other.memory_bytes > device.memory_bytes and other.prices
    ]
    yield from sorted((found for found in larger if found.fits), key=_cost)[:_MOST_DEVICES]


def _other_trainings(training: Training, here: bool) -> Iterator[tuple[str, Training]]:
    if not training.fused_loss and not here:  # ours makes its logits in chunks
        yield "add --fused-loss", replace(training, fused_loss=True)
    if training.lora_rank:
        return
    light = replace(training, fused_loss=True)
    if training.optimizer == "adamw":
        yield "take --optimizer adamw-8bit", replace(training, optimizer="adamw-8bit")
        yield "take --optimizer adamw-8bit --fused-loss", replace(light, optimizer="adamw-8bit")
    if training.precision == "bf16":
        yield "take --precision pure-bf16", replace(training, precision="pure-bf16")
        yield "take --precision pure-bf16 --fused-loss", replace(light, precision="pure-bf16")
    if not training.offload:
        yield "add --offload", replace(training, offload=True)
        yield "add --offload --fused-loss", replace(light, offload=True)


def _lighter_trainings(job: Job) -> Iterator[tuple[str, Training]]:
    """The same with fewer weights trained, or narrower ones beside them."""
    training = job.training
    if not _takes_adapters(job.config):
        return
    if not training.lora_rank:
        named = job.method == "full"
        change = "take --method lora" if named else f"add --lora {RANK}"
        yield change, replace(training, lora_rank=RANK, optimizer="adamw", reference=False)
    if training.base_bits == 16 and job.method in ("full", "lora"):
        rank = training.lora_rank or RANK
        yield "take --method qlora", replace(training, lora_rank=rank, base_bits=4, optimizer="adamw")


def _cost(found: Option) -> tuple[bool, float]:
    """Fitting first, then by dollars, or by hours where no price is known."""
    return not found.fits, (found.usd or found.device_hours).likely


def _assumptions(job: Job, asked: Option) -> Iterator[Assumption]:
    training = job.training
    if asked.here:
        yield Assumption(
            "Farthing runs it, and memory is counted as its trainer takes it", "docs/counting.md"
        )
    else:
        why = elsewhere(job, asked.count) or "computes no layer again, as this needs"
        yield Assumption(f"another trainer runs it: Farthing {why}", "docs/training.md")
    yield Assumption(
        "products run at the efficiency fitted on pretraining runs, and what is recomputed comes on top",
        "farthing plan --validate",
    )
    yield Assumption(f"sequences are {job.mean:,} tokens long on average, {job.seq_len:,} at most", "given")
    if training.lora_rank:
        yield Assumption(
            f"adapters of rank {training.lora_rank} on every linear map; no gradient of frozen weights: two forward "
            "passes' work a token, not three",
            "arXiv:2106.09685",
        )
    if training.base_bits == 4:
        yield Assumption(
            "4-bit NormalFloat inside the layers, 4.127 bits a weight; the time to widen it is not counted",
            "arXiv:2305.14314 section 3",
        )
    if job.answers is not None:
        yield Assumption(
            f"answers are {job.answers.mean:,.0f} tokens on average after questions of {PROMPT}; "
            f"{percent(job.kept, 0)} of them are trained on, with a KL term",
            published_guess(job.config).source,
        )
    if job.method == "distill" and training.teacher is None:
        yield Assumption("the teacher's text is there: nothing is sampled from it", "scope")
    if training.offload:
        yield Assumption(
            "the host holds the states, and reaches them at 32 GB/s a device", "arXiv:2101.06840; PCIe 4"
        )
    yield Assumption(f"at most {percent(USABLE, 0)} of memory is used", "assumed")
    yield Assumption("one run that succeeds: no search for settings, no data, no evaluation", "scope")


def method_text(plan: MethodPlan) -> str:
    """The plan as text."""
    job, asked = plan.job, plan.asked
    where = f"{job.method} on {plan.count} x {plan.device.name}"
    title = f"{plan.name}   {where}, {job.precision}, {job.training.optimizer}"
    held = asked.candidate.held
    parts = ", ".join(f"{name} {bytes_(size)}" for name, size in held.parts().items() if size)
    room = f"{bytes_(held.total)} of {bytes_(plan.device.memory_bytes)} a device"
    rows = [
        ("model", f"{letters(plan.parameters.total)} parameters, {letters(plan.parameters.active)} active"),
        ("work", f"{letters(job.tokens)} tokens, {job.steps:,.0f} steps of {job.batch}"),
        ("memory" if plan.fits else "does not fit", room),
        ("", parts),
        ("layout", str(asked.candidate)),
        ("time", f"{_span(plan.wall_hours)}, {range_text(asked.device_hours)} device-hours"),
        ("dollars", range_text(asked.usd, money) if asked.usd else "no price is known: give --price"),
    ]
    lines = [title, *(f"  {label:12} {text}" for label, text in rows)]
    lines.append("  with one change:")
    width = max((len(each.change) for each in plan.changes), default=0)
    for each in plan.changes:
        usd = money(each.usd.likely) if each.usd and each.fits else ""
        fits = "fits" if each.fits else "no"
        lines.append(
            f"    {each.change:{width}}  {fits:4}  {bytes_(each.candidate.memory_bytes):>8}  {usd}".rstrip()
        )
    if plan.remedy:
        lines.append(f"  cheapest that fits: {plan.remedy}")
    lines.append("  assumed:")
    lines += [f"    {a.what} ({a.source})" for a in plan.assumptions]
    return "\n".join(lines)


def _span(hours: Range) -> str:
    return f"{duration(3600 * hours.likely)} ({duration(3600 * hours.low)} to {duration(3600 * hours.high)})"


def method_of(text: str) -> Method:
    """The method of that name. Raises UserError for another."""
    for method in METHODS:
        if text == method:
            return method
    hint = nearest(text, list(METHODS))
    raise UserError(f"--method {text}: must be {', '.join(METHODS)}{f'; {hint}' if hint else ''}")


def optimizer_of(text: str) -> Optimizer:
    """The optimizer of that name. Raises UserError for another."""
    for optimizer in OPTIMIZERS:
        if text == optimizer:
            return optimizer
    raise UserError(f"--optimizer {text}: must be {', '.join(OPTIMIZERS)}")
