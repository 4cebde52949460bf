"""Trains a random model for two steps in a process of its own and prints the memory that took, as JSON.

python tests/cost/peak.py '{"kind": "pretrain", "config": {...}, "dtype": "bfloat16", "length": 256, ...}'

`base` is what was resident before there was a model, `peak` the most at any time, both in bytes (Linux's
VmRSS and VmHWM; on a GPU the most that torch's allocator had handed out, and a base of 0).
"""

import json
import multiprocessing
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from farthing.base.device import Alone
from farthing.base.heap import keep_freed_memory
from farthing.cost.devices import Device
from farthing.cost.meter import Meter
from farthing.data.packing import PackedBatch
from farthing.engine import Engine, Request, Sampling
from farthing.model import Decoder
from farthing.recipe import validate
from farthing.tasks import Item
from farthing.train.grpo import Learner
from farthing.train.lm import lm_step
from farthing.train.optim import MasterWeights, add_lora
from farthing.train.rollout import Batch, Group
from farthing.weights import decoder_config, load_decoder, save_decoder

STEPS = 2


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def batch(case: dict, vocab: int, device: str) -> PackedBatch:
    """Random rows; fine-tuning sees conversations of a quarter row and learns from three quarters of each."""
    rows, length = case["rows"], case["length"]
    ids = torch.randint(vocab, (rows * length,), device=device)
    targets = ids.roll(-1)
    if case["kind"] == "sft":
        targets[torch.arange(len(ids), device=device) % 4 < 1] = -100
    pieces = [length // 4] * 4 * rows if case["kind"] == "sft" else [length] * rows
    documents = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces)).to(device)
    return PackedBatch(ids, targets, documents, pieces, [length] * rows, length)


def train_text(case: dict, decoder: Decoder) -> None:
    """Pretraining, fine-tuning, or the latter with LoRA."""
    device = decoder.embed.weight.device.type
    if case["kind"] == "lora":
        add_lora(decoder, case["rank"], 2.0 * case["rank"], seed=0)
    weights = MasterWeights(decoder, case["optimizer"], 1e-4, (0.9, 0.95), 0.0)
    data = batch(case, decoder.config.vocab_size, device)
    for _ in range(STEPS):
        mtp = 0.3 if decoder.config.mtp_depth else 0.0
        lm_step(decoder, data, case["config"], case["micro_tokens"], mtp_weight=mtp, ranks=Alone("cpu"))
        weights.clip(1.0)
        weights.step(1e-4)


def train_policy(case: dict, decoder: Decoder) -> None:
    """Answers sampled, every second one called right, and learnt from."""
    stage = validate({
        "name": "peak", "base": "none",
        "stages": [{
            "kind": "grpo", "tasks": {"chain_sum": 1}, "steps": STEPS, "prompts": case["rows"],
            "group": case["group"], "max_new_tokens": case["new_tokens"], "optimizer": case["optimizer"],
            "memory_gb": 100.0, "sync_every": 1000, "max_grad_norm": 1e9,
        }],
    }).stages[0]  # fmt: skip
    with (
        TemporaryDirectory() as folder,
        Meter(
            Path(folder) / "ledger.jsonl", stage="01-grpo", device=Device("test", "cpu"), rate=(0.0, "test")
        ) as meter,
    ):
        weights = MasterWeights(decoder, stage.optimizer, stage.lr, stage.betas, 0.0)
        answers = stage.prompts * stage.group
        engine = Engine(decoder, max_batch=answers, cache_tokens=answers * case["length"])
        learner = Learner(stage, decoder, None, weights, case["config"], meter, Alone("cpu"))
        learner.budget = case["micro_tokens"]
        draw = random.Random(0)
        for step in range(STEPS):
            prompts = [
                [
                    draw.randrange(decoder.config.vocab_size)
                    for _ in range(case["length"] - case["new_tokens"])
                ]
                for _ in range(stage.prompts)
            ]
            sampling = Sampling(max_new_tokens=stage.max_new_tokens, temperature=1.0, seed=step)
            engine.cache.forget()
            requests = [Request(prompt, sampling, stage.group) for prompt in prompts]
            outcomes = [("right", "wrong")[number % 2] for number in range(stage.group)]
            item = Item("chain_sum", 0, 0, "question", "1", {"scorer": "integer"})
            groups = [
                Group(item, prompt, samples, outcomes)
                for prompt, samples in zip(prompts, engine.generate(requests), strict=True)
            ]
            learner.learn(Batch(groups, groups), step)


def loaded(case: dict, device: str) -> Decoder:
    """Random weights from a folder, as every stage begins; but for pretraining another process wrote it."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if case["kind"] == "pretrain":
            write(case, folder)
        else:
            writer = multiprocessing.get_context("spawn").Process(target=write, args=(case, folder))
            writer.start()
            writer.join()
        return load_decoder(folder, getattr(torch, case["dtype"]), device)


def write(case: dict, folder: Path) -> None:
    """A model folder without a tokenizer."""
    decoder = Decoder(decoder_config(case["config"]))
    decoder.init_weights(seed=0)
    save_decoder(decoder.bfloat16(), case["config"], folder, tokenizer_from=None)


def main(case: dict) -> dict:
    torch.manual_seed(0)
    device = case["device"]
    keep_freed_memory()
    torch.randn(64, 64, requires_grad=True).square().sum().backward()  # autograd's own thread and buffers
    base = status("VmRSS") if device == "cpu" else 0
    decoder = loaded(case, device)
    (train_policy if case["kind"] == "grpo" else train_text)(case, decoder)
    peak = status("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"base": base, "peak": peak}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
