"""Measure this machine with this program's own network, in at most ten seconds: `farthing calibrate`.

Rates of large products say little about a small network, whose time goes into many small operations. So the
layers themselves are timed: a network as wide as SmolLM2-135M (hidden size 576, 49,152 entries) with random
weights, at two depths and with few and many rows, which is enough to tell what a layer takes whatever it does
from what a FLOP takes, and both from the head's share.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from farthing.cost import hardware
from farthing.cost.calibrate import Calibration, Pace, machine, save, shortest
from farthing.cost.flops import forward_flops

DEPTHS = (1, 4)
GROUP, PROMPT, ANSWER = 8, 48, 12  # samples of a question, and tokens, about those of the quickstart recipe
QUESTIONS = (1, 8)


def calibrate() -> Calibration:
    """Measure and keep the result."""
    import torch

    started = time.perf_counter()
    device = hardware.detect()
    found = machine()
    times: dict[str, dict[tuple[int, int], float]] = {"prefill": {}, "decode": {}, "train": {}}
    optimizer = 0.0
    for depth in DEPTHS:
        probe = _Probe(depth)
        for questions in QUESTIONS:
            first, step = probe.sample(questions)
            times["prefill"][depth, questions], times["decode"][depth, questions] = first, step
            times["train"][depth, questions] = probe.train(questions)
        optimizer = probe.update()
    paces = {kind: _pace(kind, seconds) for kind, seconds in times.items()}
    calibration = Calibration(
        date=datetime.now(UTC).date().isoformat(),
        device=device.name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        took=time.perf_counter() - started,
        gemm_float32=found["gemm_float32"],
        gemm_bfloat16=found["gemm_bfloat16"],
        bandwidth=found["bandwidth"],
        disk=found["disk"],
        small_op=found["small_op"],
        decode=paces["decode"],
        prefill=paces["prefill"],
        train=paces["train"],
        optimizer=optimizer,
    )
    save(calibration)
    return calibration


def config(depth: int) -> dict[str, Any]:
    """The network that is timed, as a Hugging Face config."""
    return {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": depth,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    }


class _Probe:
    """A network of some depth, timed at what a training run does."""

    def __init__(self, depth: int) -> None:
        import torch

        from farthing.engine import Engine
        from farthing.model import Decoder
        from farthing.model.memory import keep_freed_memory
        from farthing.train.optim import MasterWeights
        from farthing.weights import decoder_config

        keep_freed_memory()
        torch.manual_seed(0)
        self.decoder = Decoder(decoder_config(config(depth))).to(torch.bfloat16)
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.normal_(std=0.02)
        self.engine = Engine(self.decoder, max_batch=GROUP * QUESTIONS[-1], cache_tokens=16_384)
        self.weights = MasterWeights(self.decoder, "adamw", 1e-9, (0.9, 0.95), 0.0)
        self.prompts = torch.randint(config(1)["vocab_size"], (QUESTIONS[-1], PROMPT)).tolist()

    def sample(self, questions: int) -> tuple[float, float]:
        """Seconds until every answer has its first token, with weights that are new, and of one token more."""

        def generate(tokens: int) -> Callable[[], object]:
            from farthing.engine import Request, Sampling

            sampling = Sampling(max_new_tokens=tokens, temperature=1.0, seed=0)
            requests = [Request(ids, sampling, GROUP) for ids in self.prompts[:questions]]

            def work() -> None:
                self.weights.publish()  # as after a step: what the engine keeps of the weights is made anew
                self.engine.generate(requests)

            return work

        first = shortest(generate(1), 2)
        return first, max(0.0, shortest(generate(ANSWER + 1), 2) - first) / ANSWER

    def train(self, questions: int) -> float:
        """Seconds of a forward and a backward pass."""
        import torch

        from farthing.model import Segments
        from farthing.train.losses import token_logprobs

        segments = Segments([(PROMPT, [ANSWER] * GROUP)] * questions)
        ids = torch.randint(config(1)["vocab_size"], (segments.tokens,))
        positions = segments.positions()
        rows = torch.arange(segments.tokens) % (PROMPT + GROUP * ANSWER) >= PROMPT

        def work() -> None:
            hidden = self.decoder.hidden(ids, positions, segments)
            (-token_logprobs(hidden[rows], self.decoder.head.weight, ids[rows])).mean().backward()

        return shortest(work, 2)

    def update(self) -> float:
        """Seconds a parameter of clipping and a step."""

        def work() -> None:
            self.weights.clip(1.0)
            self.weights.step(1e-9)

        return shortest(work, 2) / sum(parameter.numel() for parameter in self.decoder.parameters())


def rows(kind: str, questions: int) -> tuple[int, int, int]:
    """Tokens through the layers, (query, key) pairs and rows through the head of one pass of the probe."""
    samples = questions * GROUP
    if kind == "decode":
        return samples, samples * (PROMPT + ANSWER // 2), samples
    own = PROMPT * (PROMPT + 1) // 2
    if kind == "prefill":
        return questions * PROMPT, questions * own, questions
    answers = GROUP * (ANSWER * PROMPT + ANSWER * (ANSWER + 1) // 2)
    return questions * (PROMPT + GROUP * ANSWER), questions * (own + answers), samples * ANSWER


def _pace(kind: str, seconds: dict[tuple[int, int], float]) -> Pace:
    """Solve for the four figures from two depths and two numbers of rows; what comes out negative is 0."""
    few, many = QUESTIONS
    shallow, deep = DEPTHS
    times = 3 if kind == "train" else 1

    def flops(depth: int, questions: int, head: bool) -> float:
        tokens, pairs, scored = rows(kind, questions)
        work = forward_flops(
            config(depth), tokens if not head else 0, pairs if not head else 0, scored * head
        )
        return times * work

    a_layer = {q: (seconds[deep, q] - seconds[shallow, q]) / (deep - shallow) for q in QUESTIONS}
    rest = {q: seconds[shallow, q] - shallow * a_layer[q] for q in QUESTIONS}
    fixed, flop = _line(flops(1, few, False), a_layer[few], flops(1, many, False), a_layer[many])
    head_fixed, head_flop = _line(flops(1, few, True), rest[few], flops(1, many, True), rest[many])
    return Pace(fixed, flop, head_fixed, head_flop)


def _line(x0: float, y0: float, x1: float, y1: float) -> tuple[float, float]:
    """Intercept and slope of the line through two points, neither of them negative."""
    slope = max(0.0, (y1 - y0) / (x1 - x0))
    intercept = y0 - slope * x0
    if intercept < 0:  # through the origin and the larger point, which is the surer one
        return 0.0, max(0.0, y1) / x1
    return intercept, slope
