"""The data of one GRPO step: questions answered by the current policy, and judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from farthing.base.device import Ranks
from farthing.cost.meter import Meter, book_sampling
from farthing.data.tokenizer import question_ids
from farthing.engine import Model, Request, Sample, Sampling
from farthing.engine.generator import Generator
from farthing.recipe import Grpo
from farthing.tasks import Item
from farthing.tasks.mixture import Stream
from farthing.tasks.pool import VerifierPool


@dataclass
class Group:
    """One question and its sampled answers."""

    item: Item
    prompt: list[int]
    samples: list[Sample]
    outcomes: list[str]  # each one of tasks.item.OUTCOMES

    @property
    def rewards(self) -> list[float]:
        """1 for a right answer, 0 for anything else, including a truncated answer."""
        return [float(outcome == "right") for outcome in self.outcomes]

    @property
    def silent(self) -> bool:
        """All samples earned the same, so none is better than another."""
        return len(set(self.rewards)) == 1


@dataclass
class Batch:
    """This rank's groups to train on, and all groups it sampled to get them."""

    groups: list[Group] = field(default_factory=list)
    sampled: list[Group] = field(default_factory=list)

    def metrics(self, ranks: Ranks) -> dict[str, Any]:
        """Shares and means over everything sampled on all ranks, silent groups included."""
        outcomes = Counter(outcome for group in self.sampled for outcome in group.outcomes)
        samples = [sample for group in self.sampled for sample in group.samples]
        count = ranks.total(len(samples))

        def mean(amount: float) -> float:
            return ranks.total(amount) / count

        return {
            "reward": mean(sum(r for group in self.sampled for r in group.rewards)),
            "right": mean(outcomes["right"]),
            "unparsed": mean(outcomes["unparsed"]),
            "cut_off": mean(outcomes["cut_off"]),
            "timeout": mean(outcomes["timeout"]),
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
            batch.sampled += groups
            batch.groups += [group for group in groups if not (stage.drop_silent and group.silent)]
            kept = self.ranks.total(len(batch.groups))
            if kept >= stage.prompts:
                break
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
        return [
            Group(item, prompt, samples, [next(verdicts).outcome_of(s.finish_reason) for s in samples])
            for item, prompt, samples in zip(items, prompts, answers, strict=True)
        ]
