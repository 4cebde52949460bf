"""The data of one GRPO step: questions answered by the current policy, and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from farthing.base.device import Ranks
from farthing.base.errors import UserError
from farthing.cost.meter import Meter, book_sampling
from farthing.data.tokenizer import question_ids
from farthing.engine import Model, Request, Sample, Sampling
from farthing.engine.generator import Generator
from farthing.recipe import Grpo
from farthing.tasks import Item, Verdict
from farthing.tasks.mixture import Stream
from farthing.tasks.pool import VerifierPool
from farthing.tasks.rewards.shaping import shaped
from farthing.tasks.rewards.total import parts_of


@dataclass
class Group:
    """One question and its sampled answers."""

    item: Item
    prompt: list[int]
    samples: list[Sample]
    outcomes: list[str]  # each one of tasks.item.OUTCOMES
    verdicts: list[Verdict] = field(default_factory=list)  # none where an outcome is all there is

    @property
    def rewards(self) -> list[float]:
        """What each answer earned: its score, or 1 if it is right and 0 if not, truncated ones included.

        An answer whose reward failed has none. It gets the mean of the others, and so no advantage.
        """
        if not self.verdicts:
            return [float(outcome == "right") for outcome in self.outcomes]
        pairs = list(zip(self.verdicts, self.outcomes, strict=True))
        earned = [float(outcome == "right") if v.score is None else v.score for v, outcome in pairs]
        known = [score for (v, _), score in zip(pairs, earned, strict=True) if v.error is None]
        mean = (known[0] if len(set(known)) == 1 else sum(known) / len(known)) if known else 0.0
        return [mean if v.error is not None else score for (v, _), score in zip(pairs, earned, strict=True)]

    @property
    def silent(self) -> bool:
        """All samples earned the same, so none is better than another."""
        return len(set(self.rewards)) == 1


@dataclass
class Batch:
    """This rank's groups to train on, and all groups it sampled to get them."""

    groups: list[Group] = field(default_factory=list)
    sampled: list[Group] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)  # names of the rewards' parts, on all ranks

    @property
    def failed(self) -> list[str]:
        """The lines about rewards that failed."""
        return [v.error for group in self.sampled for v in group.verdicts if v.error is not None]

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Shares and means over everything sampled on all ranks, silent groups included."""
        outcomes = Counter(outcome for group in self.sampled for outcome in group.outcomes)
        samples = [sample for group in self.sampled for sample in group.samples]
        count = ranks.total(len(samples))

        def mean(amount: float) -> float:
            return ranks.total(amount) / count

        found = [verdict.parts for group in self.sampled for verdict in group.verdicts]
        parts: dict[str, float] = {}
        for name in sorted(self.parts):
            values = [scores[name] for scores in found if name in scores]
            if number := ranks.total(len(values)):
                parts[name] = ranks.total(sum(values)) / number
        return {
            "reward": mean(sum(r for group in self.sampled for r in group.rewards)),
            "right": mean(outcomes["right"]),
            "unparsed": mean(outcomes["unparsed"]),
            "cut_off": mean(outcomes["cut_off"]),
            "timeout": mean(outcomes["timeout"]),
            "error": mean(len(self.failed)),
            **({"reward_parts": parts} if parts else {}),
            "entropy": mean(sum(sample.entropy for sample in samples)),
            "length": mean(sum(len(sample.ids) for sample in samples)),
            "silent": ranks.total(sum(group.silent for group in self.sampled))
            / ranks.total(len(self.sampled)),
            "groups_kept": ranks.total(len(self.groups)),
            "groups_sampled": ranks.total(len(self.sampled)),
        }


class Roller:
    """Collects batches: takes questions from a stream, samples answers, verifies, drops and refills."""

    def __init__(
        self,
        stage: Grpo,
        model: Model,
        generator: Generator,
        stream: Stream,
        pool: VerifierPool,
        meter: Meter,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self.stage, self.model, self.generator = stage, model, generator
        self.stream, self.pool, self.meter, self.seed, self.ranks = stream, pool, meter, seed, ranks

    def collect(self, step: int, cursor: int) -> tuple[Batch, int]:
        """The batch of a step and the cursor after the questions it took. Depends on the weights, the step
        and the cursor alone."""
        # every step is a version: a continued run starts without cached prefixes, and rounding would show the
        # difference
        self.generator.take_weights(self.model.decoder, step + 1)
        batch, stage = Batch(), self.stage
        asked, kept = 0, 0
        for _ in range(1 + stage.refill):
            items, cursor = self.stream.take(cursor, stage.prompts - kept)
            own = self.ranks.share(len(items))
            groups = self._ask(items[own], step, first_sample=(asked + own.start) * stage.group)
            asked += len(items)
            batch.parts |= {name for item in items for name in parts_of(item)}
            batch.sampled += groups
            batch.groups += [group for group in groups if not (stage.drop_silent and group.silent)]
            kept = self.ranks.total(len(batch.groups))
            if kept >= stage.prompts:
                break
        failed, answers = (
            self.ranks.total(count)
            for count in (len(batch.failed), sum(len(group.samples) for group in batch.sampled))
        )
        if failed == answers:
            said = batch.failed[0] if batch.failed else "another process says how"
            raise UserError(
                f"step {step + 1}: the reward failed for every answer: {said}; mend it, and run again"
            )
        return batch, cursor

    def _ask(self, items: Sequence[Item], step: int, first_sample: int) -> list[Group]:
        stage, tokenizer = self.stage, self.model.tokenizer
        sampling = Sampling(
            max_new_tokens=stage.max_new_tokens, temperature=stage.temperature, seed=(self.seed << 32) + step
        )
        prompts = [
            question_ids(tokenizer, item.asked, stage.prompt, item.system or stage.system) for item in items
        ]
        requests = [
            Request(prompt, sampling, stage.group, first_sample + number * stage.group)
            for number, prompt in enumerate(prompts)
        ]
        with self.meter.span("generate", step=step) as span:
            answers = self.generator.generate(requests)
            book_sampling(span, self.generator.done(), self.model.hf_config)
            span.tokens_in = self.ranks.total(span.tokens_in)
            span.tokens_out = self.ranks.total(span.tokens_out)
            span.flops = self.ranks.total(span.flops)
        with self.meter.span("verify", step=step):
            pairs = [
                (item, tokenizer.decode(sample.ids))
                for item, samples in zip(items, answers, strict=True)
                for sample in samples
            ]
            verdicts = iter(self.pool.verify(pairs, stage.answer))
        groups: list[Group] = []
        for item, prompt, samples in zip(items, prompts, answers, strict=True):
            group = shaped(
                item,
                [next(verdicts) for _ in samples],
                [len(sample.ids) for sample in samples],
                [sample.finish_reason == "length" for sample in samples],
                stage.max_new_tokens,
            )
            outcomes = [v.outcome_of(s.finish_reason) for v, s in zip(group, samples, strict=True)]
            groups.append(Group(item, prompt, samples, outcomes, group))
        return groups
