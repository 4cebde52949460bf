"""Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300 section 4; DeepSeek-R1,
arXiv:2501.12948).

For every question, sample a group of answers, reward the right ones, and raise the probability of each answer's
tokens by how much better it did than its group. The sampler reads the trainer's own parameters; training checks that
both agree on the log-probability of the samples (the sync proof). A mixture of experts is trained through the experts
that the sampler used (routing replay, arXiv:2510.11370), since rounding may route a token elsewhere; the routers'
correction biases do not change.

Shapes: N tokens through the network, M completion tokens, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farthing.base.device import Ranks
from farthing.cost.flops import forward_flops
from farthing.cost.memory import code_of, precision_of, tokens_per_pass
from farthing.cost.meter import Meter
from farthing.model import Decoder, ModelConfig, Segments
from farthing.model.moe import Routing
from farthing.recipe import Grpo
from farthing.train.loop import Diverged, check_norm
from farthing.train.losses import (
    advantages,
    clipped_objective,
    k3,
    k3_corrected,
    token_logprobs,
    token_weights,
)
from farthing.train.optim import MasterWeights, learning_rate
from farthing.train.rollout import Batch, Group


@dataclass
class Answer:
    """One completion as the loss sees it."""

    ids: list[int]
    old_logprobs: list[float]
    advantage: float
    weight: float  # of each of its tokens in the loss; 0 in a group left out for want of signal
    routes: Tensor | None = None  # as in `Sample`
    kl_weight: float = 0.0  # of each of its tokens in the KL term


@dataclass
class Pass:
    """Prompts with their answers that go through the network together; each prompt goes through once."""

    prompts: list[tuple[list[int], list[Answer]]] = field(default_factory=list)

    @property
    def answers(self) -> list[Answer]:
        """All answers, in the order of their tokens."""
        return [answer for _, answers in self.prompts for answer in answers]


class Learner:
    """Turns batches into updates of the weights."""

    def __init__(
        self,
        stage: Grpo,
        decoder: Decoder,
        reference: Decoder | None,
        weights: MasterWeights,
        hf_config: dict[str, Any],
        meter: Meter,
        ranks: Ranks,
    ) -> None:
        self.stage, self.decoder, self.reference = stage, decoder, reference
        self.weights, self.hf_config, self.meter, self.ranks = weights, hf_config, meter, ranks
        weight = decoder.embed.weight
        self.budget = tokens_per_pass(
            hf_config,
            stage.memory_gb,
            length=stage.max_new_tokens,
            precision=precision_of(weight.dtype),
            code=code_of(weight.device.type),
            kind="grpo",
            lora=stage.lora_rank,
        )

    def learn(self, batch: Batch, step: int) -> dict[str, Any]:
        """One optimizer step for each of `updates` equal parts of the batch's groups.

        Raises:
            Diverged: before a broken gradient, or a failed sync proof, changes anything.
        """
        stage = self.stage
        lr = learning_rate(step, stage.steps, stage.lr, stage.warmup, stage.schedule)
        log = _Log(measures_kl=self.reference is not None)
        # the KL term is about all that the policy says, so it takes in what has no advantage
        left_out = (
            [group for group in batch.sampled if group.silent] if stage.kl and stage.drop_silent else []
        )
        parts = zip(_parts(batch.groups, stage.updates), _parts(left_out, stage.updates), strict=True)
        for part, silent in parts:
            answers = prepare(part, stage, self.ranks, silent)
            everyone = [answer for _, group in answers for answer in group]
            signal = self.ranks.total(sum(answer.advantage != 0 for answer in everyone))
            log.signal += signal
            if not (self.ranks.total(len(everyone)) if stage.kl else signal):
                continue  # nothing to learn from
            with self.meter.span("train", step=step) as span:
                flops, tokens = 0, 0
                for one_pass in passes(answers, self.budget):
                    flops += self._backward(one_pass, log)
                    tokens += sum(len(prompt) for prompt, _ in one_pass.prompts)
                    tokens += sum(len(answer.ids) for answer in one_pass.answers)
                span.flops += self.ranks.total(flops)
                span.tokens_in += self.ranks.total(tokens)
                if log.updates == 0 and step % stage.sync_every == 0:
                    self._prove_sync(log)
                self.weights.sum_gradients(self.ranks)
                norm = self.weights.clip(stage.grad_clip)
                check_norm(norm, stage.max_grad_norm)
                self.weights.step(lr)
                log.norms.append(norm)
                log.updates += 1
        return {"lr": lr, **log.metrics(self.ranks, proved=step % stage.sync_every == 0)}

    def _backward(self, one_pass: Pass, log: _Log) -> int:
        """Forward and backward of one pass; returns its FLOPs."""
        stage, answers = self.stage, one_pass.answers
        device = self.decoder.embed.weight.device
        ids, segments, rows, targets = layout(one_pass, device)
        positions = segments.positions().to(device)
        hidden = self.decoder.hidden(ids, positions, segments, replay(one_pass, self.decoder.config))
        how = (targets, stage.temperature, self.decoder.config.logit_softcap)
        logprobs = token_logprobs(hidden.index_select(0, rows), self.decoder.head.weight, *how)
        sampled = torch.tensor([p for answer in answers for p in answer.old_logprobs], device=device)
        if log.updates == 0:
            log.compare(logprobs.detach(), sampled)
        # With one update a batch the policy being improved is the one that sampled: the ratio is 1 by
        # definition, not 1 give or take the rounding between two ways of computing it.
        old = logprobs.detach() if stage.updates == 1 else sampled

        def each(name: str) -> Tensor:
            values = [value for answer in answers for value in [getattr(answer, name)] * len(answer.ids)]
            return torch.tensor(values, device=device)

        advantage, weight = each("advantage"), each("weight")
        objective, held = clipped_objective(logprobs, old, advantage, stage.clip_low, stage.clip_high)
        loss = -(objective * weight).sum()
        if self.reference is not None:
            with torch.no_grad():
                seen = self.reference.hidden(ids, positions, segments)[rows]
                expected = token_logprobs(seen, self.reference.head.weight, *how)
            corrected = stage.kl_estimator == "k3_corrected"
            kl = k3_corrected(logprobs, old, expected) if corrected else k3(logprobs, expected)
            loss = loss + stage.kl * (kl * each("kl_weight")).sum()
            log.kl_sum += float(kl.detach().sum())
        loss.backward()
        log.held += int(held.sum())
        log.tokens += len(targets)
        pairs = segments.pairs(self.decoder.config.windows)
        work = forward_flops(self.hf_config, len(ids), pairs, len(targets))
        return 3 * work + (work if self.reference is not None else 0)

    def _prove_sync(self, log: _Log) -> None:
        mean, _ = log.sync(self.ranks)
        if not mean <= self.stage.sync_tolerance:  # written so that NaN fails too
            raise Diverged(
                f"sampler and trainer disagree on the sampled tokens by {mean:.3f} nats on average "
                f"(sync_tolerance {self.stage.sync_tolerance:g}): the samples are not this policy's"
            )


@dataclass
class _Log:
    """Sums over the passes of a step, of this rank."""

    measures_kl: bool
    signal: int = 0  # of all ranks
    updates: int = 0
    tokens: int = 0
    held: int = 0
    kl_sum: float = 0.0
    norms: list[float] = field(default_factory=list)
    sync_tokens: int = 0
    sync_sum: float = 0.0
    sync_max: float = 0.0

    def compare(self, trained: Tensor, sampled: Tensor) -> None:
        difference = (trained - sampled).abs()
        self.sync_tokens += len(difference)
        self.sync_sum += float(difference.sum())
        self.sync_max = max(self.sync_max, float(difference.max()))

    def sync(self, ranks: Ranks) -> tuple[float, float]:
        """Mean and largest difference between sampler and trainer, over all ranks."""
        mean = ranks.total(self.sync_sum) / max(1, ranks.total(self.sync_tokens))
        largest = torch.zeros(ranks.count, dtype=torch.float64, device=ranks.device)
        largest[ranks.index] = self.sync_max
        return mean, float(ranks.total(largest).max())

    def metrics(self, ranks: Ranks, proved: bool) -> dict[str, Any]:
        proved = proved and self.updates > 0
        tokens, held = ranks.total(self.tokens), ranks.total(self.held)
        kl = ranks.total(self.kl_sum)
        mean, largest = self.sync(ranks)
        return {
            "signal": self.signal,
            "grad_norm": max(self.norms, default=None),
            "clip_fraction": held / tokens if tokens else None,
            "kl": kl / tokens if self.measures_kl and tokens else None,
            "sync_mean": mean if proved else None,
            "sync_max": largest if proved else None,
        }


def _parts(groups: Sequence[Group], count: int) -> Iterator[Sequence[Group]]:
    """`groups` in `count` parts whose sizes differ by at most one; every rank has as many, empty ones included."""
    for number in range(count):
        yield groups[number * len(groups) // count : (number + 1) * len(groups) // count]


def prepare(
    groups: Sequence[Group], stage: Grpo, ranks: Ranks, silent: Sequence[Group] = ()
) -> list[tuple[list[int], list[Answer]]]:
    """Every group's prompt with the answers that train, their advantages and token weights.

    Args:
        silent: groups that train by the KL term alone; the mean over the others is taken as if they were not there.
    """
    prepared: list[tuple[list[int], list[Answer]]] = []
    rewarded = 0
    for number, group in enumerate([*groups, *silent]):
        scores = [0.0] * len(group.samples)  # also where the mean of equal rewards is rounded
        if not group.silent:
            scores = advantages(torch.tensor([group.rewards]), stage.advantage)[0].tolist()
        answers = [
            Answer(sample.ids, sample.logprobs, score, 0.0, sample.routes)
            for sample, score in zip(group.samples, scores, strict=True)
            if not (stage.mask_truncated and sample.finish_reason == "length")
        ]
        if answers:
            prepared.append((group.prompt, answers))
            rewarded += len(answers) if number < len(groups) else 0
    everyone = [answer for _, answers in prepared for answer in answers]
    lengths = [len(answer.ids) for answer in everyone]
    weights = token_weights(lengths[:rewarded], stage.loss, stage.max_new_tokens, ranks)
    for answer, weight in zip(everyone[:rewarded], weights, strict=True):
        answer.weight = weight
    if stage.kl:
        weights = token_weights(lengths, stage.loss, stage.max_new_tokens, ranks)
        for answer, weight in zip(everyone, weights, strict=True):
            answer.kl_weight = weight
    return prepared


def passes(prepared: Iterable[tuple[list[int], list[Answer]]], budget: int) -> Iterator[Pass]:
    """The answers in passes of at most `budget` tokens (one answer with its prompt if that alone is more)."""
    current, used = Pass(), 0
    for prompt, answers in prepared:
        opened = False
        for answer in answers:
            need = len(answer.ids) + (0 if opened else len(prompt))
            if used and used + need > budget:
                yield current
                current, used, opened = Pass(), 0, False
                need = len(answer.ids) + len(prompt)
            if not opened:
                current.prompts.append((prompt, []))
                opened = True
            current.prompts[-1][1].append(answer)
            used += need
    if used:
        yield current


def layout(one_pass: Pass, device: torch.device | None = None) -> tuple[Tensor, Segments, Tensor, Tensor]:
    """Layout of a pass as one flat list of tokens.

    Returns:
        ids [N]; the segments they form; for each completion token the row that predicts it, [M]: the token
        before it, which for the first is the prompt's last; the completion tokens [M].
    """
    ids: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    for prompt, answers in one_pass.prompts:
        ids += prompt
        last = len(ids) - 1
        for answer in answers:
            start = len(ids)
            rows += [last, *range(start, start + len(answer.ids) - 1)]
            targets += answer.ids
            ids += answer.ids
    segments = Segments(
        [(len(prompt), [len(a.ids) for a in answers]) for prompt, answers in one_pass.prompts]
    )
    flat, at, wanted = (torch.tensor(values, device=device) for values in (ids, rows, targets))
    return flat, segments, at, wanted


def replay(one_pass: Pass, config: ModelConfig) -> Routing | None:
    """The experts that the sampler used, for the tokens in the order of `layout`; None where it recorded none."""
    parts: list[Tensor] = []
    for prompt, answers in one_pass.prompts:
        for number, answer in enumerate(answers):
            if answer.routes is None:
                return None
            # The last token never went through the sampler. Nothing is read from its row, so any experts do.
            parts += [answer.routes[len(prompt) if number else 0 :], answer.routes[-1:]]
    chosen_NLK = torch.cat(parts).long()
    return Routing(replay=dict(zip(config.moe_layers, chosen_NLK.unbind(1), strict=True)))
