"""Measure this machine with this program's own network, in ten seconds at most: `farthing calibrate`.

Rates of large products say little about a small network, whose time goes into many small operations. So the layers
themselves are timed: a network as wide as SmolLM2-135M (hidden size 576) with random weights, in the dtype that a run
would use, at two depths and with few and many rows. That is enough to tell what a layer takes whatever it does from
what a FLOP takes, and both from the head's share. Narrow layers and routing are measured apart (`narrow`).

A slow machine gets a smaller probe: the smallest is timed first, and then the largest that should fit in what is left
of the time. Work that turns out slower than expected is given up, and what was found before holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from farthing.base.device import Place, choose, free_memory, reference_only
from farthing.base.errors import UserError
from farthing.base.heap import keep_freed_memory
from farthing.base.processor import isa
from farthing.cost import devices
from farthing.cost.flops import forward_flops, parameters
from farthing.cost.memory import WIDTH, precision_of
from farthing.cost.meter import process_started
from farthing.plans import measured as machine
from farthing.plans import narrow
from farthing.plans.measured import Calibration, Pace
from farthing.plans.speed import ENOUGH, LAUNCHES

if TYPE_CHECKING:
    from farthing.engine import Request

T = TypeVar("T")
K = TypeVar("K")
Say = Callable[[str], None]
Times = dict[tuple[str, int, int], float]
"""Seconds of a kind of pass at a depth with a number of questions."""

SECONDS = 8.0  # from the start of the process, loading torch included
AT_LEAST = 3.0  # for measuring, however long loading took
ROUNDS = 3  # of every pass that is timed; the first one also wakes and plans
UPDATE = 100  # FLOPs that take about as long as what is done to a parameter: made, copied, updated
# Seconds of a FLOP over those in a large product, at least and at most: in a probe of `ENOUGH` tokens and in a smaller
# one, where noise is as large as the difference of two passes. The latter as seen in float32 on AVX2, 2026-11-26.
BOUNDS, USUAL = (0.8, 10.0), (1.5, 3.5)
SHARE = 0.25  # of the time that is left, at most, for narrow layers
SLOWER = 1.5  # a larger probe may take this many times its expected seconds


@dataclass(frozen=True)
class Size:
    """The amount of work in a probe."""

    vocabulary: int
    depths: tuple[int, int]
    questions: tuple[int, int]
    group: int
    """Answers to a question."""
    prompt: int
    """Tokens of a question."""
    answer: int

    def passes(self) -> Iterator[tuple[int, int]]:
        """The depths and numbers of questions that are timed."""
        for depth in self.depths:
            for questions in self.questions:
                yield depth, questions

    def config(self, depth: int) -> dict[str, Any]:
        """The network that is timed, as a Hugging Face config."""
        return {
            "model_type": "llama",
            "hidden_size": narrow.WIDE,
            "num_hidden_layers": depth,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "intermediate_size": 1536,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
        }

    def rows(self, kind: str, questions: int) -> tuple[int, int, int]:
        """Tokens through the layers, (query, key) pairs and rows through the head of one pass."""
        samples = questions * self.group
        if kind == "decode":
            return samples, samples * (self.prompt + self.answer // 2), samples
        own = self.prompt * (self.prompt + 1) // 2
        if kind == "prefill":
            return questions * self.prompt, questions * own, questions
        answers = self.group * (self.answer * self.prompt + self.answer * (self.answer + 1) // 2)
        tokens = questions * (self.prompt + self.group * self.answer)
        return tokens, questions * (own + answers), samples * self.answer

    def flops(self, kind: str, depth: int, questions: int, head: bool) -> float:
        """FLOPs of one pass, in the layers or in the head."""
        tokens, pairs, scored = self.rows(kind, questions)
        work = forward_flops(self.config(depth), 0 if head else tokens, 0 if head else pairs, scored * head)
        return float((3 if kind == "train" else 1) * work)

    @property
    def tokens(self) -> int:
        """Of the largest pass."""
        return self.rows("train", self.questions[1])[0]

    def all_flops(self, kind: str, depth: int, questions: int) -> float:
        """FLOPs of one pass."""
        return self.flops(kind, depth, questions, False) + self.flops(kind, depth, questions, True)

    @property
    def work(self) -> float:
        """Work that a probe's time grows with: FLOPs of all its parts once, and parameters initialized."""
        times = {"prefill": 2, "decode": self.answer, "train": 1}
        passes = sum(times[kind] * self.all_flops(kind, d, q) for d, q in self.passes() for kind in times)
        return passes + UPDATE * sum(parameters(self.config(depth)).total for depth in self.depths)

    @property
    def bytes(self) -> int:
        """Of memory at most: weights, gradients, masters and moments of both networks, and a pass."""
        return 24 * sum(parameters(self.config(depth)).total for depth in self.depths) + (300 << 20)


SIZES = (
    Size(4096, depths=(1, 2), questions=(1, 2), group=2, prompt=16, answer=4),
    Size(4096, depths=(1, 2), questions=(1, 3), group=4, prompt=16, answer=6),
    Size(8192, depths=(1, 3), questions=(1, 4), group=4, prompt=24, answer=6),
    Size(8192, depths=(1, 4), questions=(1, 4), group=8, prompt=32, answer=8),
    Size(16384, depths=(1, 4), questions=(1, 4), group=8, prompt=48, answer=12),
    Size(49152, depths=(1, 4), questions=(1, 8), group=8, prompt=48, answer=12),  # as quickstart's steps
)


class TooLate(Exception):
    """No time is left for a measurement."""


def calibrate(place: Place | None = None, say: Say = lambda _: None) -> Calibration:
    """Measure this machine's CPU in the dtype of `place`, by default what `choose` finds best.

    Args:
        say: called with a sentence before each part is measured.

    Raises:
        UserError: for a place that is not a CPU.
    """
    called = time.perf_counter() - min(SECONDS, max(0.0, time.time() - process_started()))
    place = place or choose()
    torch = _load(place)
    loaded = time.perf_counter()
    until = max(called + SECONDS, loaded + AT_LEAST)
    device = devices.detect(place.device)
    if place.device != "cpu":
        raise UserError(
            f"{place.device} ({device.name}): only the CPU is calibrated, a GPU is planned from the catalogue; "
            "use --device cpu to measure the CPU"
        )

    def left() -> float:
        return until - time.perf_counter()

    say(f"matrix products in {place.dtype}, and a few in the other dtype")
    gemm = {
        dtype: machine.products(dtype, 0.8)
        if dtype == place.dtype
        else machine.products(dtype, 0.03, smallest=128)
        for dtype in machine.DTYPES
    }
    say("memory")
    copied = machine.bandwidth(0.2)
    small = machine.small_op()
    say("disk")
    written = machine.disk(0.3)
    keep_freed_memory()
    found, layers = None, {}
    if SIZES[0].work / gemm[place.dtype] < left():
        layers = _measure_narrow(place, left, say)
        found = climb(lambda size: _measure(size, place, left, say), left, _fitting())
    if found is None:
        say("too slow, or too busy, for a network: its figures are worked out from products and memory")
        paces, optimizer = worked_out(place.dtype, gemm[place.dtype], copied, small)
    else:
        size, (seconds, optimizer) = found
        paces = {
            kind: solve(kind, size, seconds, gemm[place.dtype]) for kind in ("prefill", "decode", "train")
        }
    flop, route = narrow.solve(layers) if layers else (0.0, 0.0)
    return Calibration(
        date=datetime.now(UTC).date().isoformat(),
        device=device.name,
        dtype=place.dtype,
        instructions=instructions(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        took=time.perf_counter() - loaded,
        timed=found[0].tokens if found else 0,
        gemm_float32=gemm["float32"],
        gemm_bfloat16=gemm["bfloat16"],
        bandwidth=copied,
        disk=written,
        small_op=small,
        decode=paces["decode"],
        prefill=paces["prefill"],
        train=paces["train"],
        optimizer=optimizer,
        narrow=flop,
        route=route,
    )


def _load(place: Place) -> Any:
    """Run torch and everything timed once, so that one-time costs of first use are not timed."""
    import torch

    if place.device == "cpu":
        probe = _Probe(SIZES[0], 1, place)
        probe.sampling(1, 2)()
        probe.training(1)()
        probe.update()
    return torch


def instructions() -> str:
    """Settings that a calibration depends on: the instructions in use, and whether fast paths are off."""
    return isa() + (", plain torch" if reference_only() else "")


def climb(
    measure: Callable[[Size], T], left: Callable[[], float], sizes: Sequence[Size] = SIZES
) -> tuple[Size, T] | None:
    """The largest size that was measured in time and its result, or None if not even the smallest was.

    The smallest comes first; then, as long as there is one, the largest that should fit in the seconds `left`,
    by what the one before took. `measure` raises TooLate when time runs out.
    """
    found: tuple[Size, T] | None = None
    size: Size | None = sizes[0]
    while size is not None:
        before = left()
        try:
            found = size, measure(size)
        except TooLate:
            break
        a_unit = SLOWER * (before - left()) / size.work
        larger = [other for other in sizes if other.work > size.work and a_unit * other.work <= left()]
        size = max(larger, key=lambda other: other.work, default=None)
    return found


def repeat(
    passes: dict[K, tuple[float, Callable[[], float]]], rounds: int, left: Callable[[], float]
) -> dict[K, float]:
    """The shortest time of each pass, in rounds over all of them: other load on the machine only adds to it.

    The first round has to be; a later one ends where the time that is left does not do for the next pass.

    Args:
        passes: work in any unit, and what does it. The first round goes from little work to much, and expects of
            each pass what the one before took for its work.

    Raises:
        TooLate: when the time that is left does not do for a pass of the first round.
    """
    found: dict[K, float] = {}
    took: dict[K, float] = {}
    a_unit = 0.0
    for round_ in range(rounds):
        for key, (work, do) in sorted(passes.items(), key=lambda item: item[1][0]):
            before = left()
            if before <= took.get(key, a_unit * work):
                if round_:
                    return found
                raise TooLate
            found[key] = min(found.get(key, float("inf")), do())
            took[key] = before - left()
            a_unit = took[key] / work
    return found


def _fitting() -> list[Size]:
    """The sizes that fit in half of the free memory; the smallest always."""
    room = free_memory("cpu") // 2
    return [size for size in SIZES if size is SIZES[0] or size.bytes <= room]


def _measure(size: Size, place: Place, left: Callable[[], float], say: Say) -> tuple[Times, float]:
    """Seconds of every pass, and of the optimizer for a parameter."""
    depths = " and ".join(str(depth) for depth in size.depths)
    say(f"sampling and training, {depths} layers, up to {size.tokens} tokens at a time")
    probes = {}
    for depth in size.depths:
        if left() <= 0:
            raise TooLate
        probes[depth] = _Probe(size, depth, place)
    passes: dict[tuple[str, int, int], tuple[float, Callable[[], float]]] = {}
    for depth, questions in size.passes():
        probe, work = probes[depth], partial(size.all_flops, depth=depth, questions=questions)
        first, step = work("prefill"), work("decode")
        passes["prefill", depth, questions] = first, probe.sampling(questions, 1)
        passes["both", depth, questions] = (
            first + size.answer * step,
            probe.sampling(questions, size.answer + 1),
        )
        passes["train", depth, questions] = work("train"), probe.training(questions)
    deep = size.depths[1]
    trained = parameters(size.config(deep)).total
    passes["update", deep, 0] = UPDATE * trained, probes[deep].update
    found = repeat(passes, ROUNDS, left)
    for depth, questions in size.passes():
        more = found["both", depth, questions] - found["prefill", depth, questions]
        found["decode", depth, questions] = max(0.0, more) / size.answer
    return found, found["update", deep, 0] / trained


def _measure_narrow(place: Place, left: Callable[[], float], say: Say) -> dict[str, float]:
    """Seconds of the passes of `narrow`; none if they do not fit in their share of the time that is left."""
    say(f"training layers {narrow.NARROW} wide, with experts and without")
    until = (1 - SHARE) * left()
    try:
        return repeat(narrow.passes(place), ROUNDS, lambda: left() - until)
    except TooLate:
        return {}


class _Probe:
    """A network of a given depth and the passes of a training run; each pass returns its seconds."""

    def __init__(self, size: Size, depth: int, place: Place) -> None:
        import torch

        from farthing.engine import Engine
        from farthing.model import Decoder
        from farthing.train.optim import MasterWeights
        from farthing.weights import decoder_config

        self.size = size
        self.decoder = Decoder(decoder_config(size.config(depth))).to(place.torch_dtype)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.decoder.parameters():
                parameter.uniform_(-0.03, 0.03, generator=draw)
        samples = size.group * size.questions[1]
        tokens = samples * (size.prompt + size.answer + 32)  # pages are taken whole
        self.engine = Engine(self.decoder, max_batch=samples, cache_tokens=tokens)
        self.weights = MasterWeights(self.decoder, "adamw", 1e-9, (0.9, 0.95), 0.0)
        shape = (size.questions[1], size.prompt)
        self.prompts = torch.randint(size.vocabulary, shape, generator=draw).tolist()

    def sampling(self, questions: int, tokens: int) -> Callable[[], float]:
        """Sample answers of `tokens` tokens with new weights."""
        from farthing.engine import Request, Sampling

        sampling = Sampling(max_new_tokens=tokens, temperature=1.0, seed=0)
        requests: list[Request] = [
            Request(ids, sampling, self.size.group) for ids in self.prompts[:questions]
        ]

        def work() -> None:
            self.weights.publish()  # as after a step: what the engine keeps of the weights is made anew
            self.engine.generate(requests)

        return lambda: machine.timed(work)

    def training(self, questions: int) -> Callable[[], float]:
        """A forward and a backward pass."""
        import torch

        from farthing.model import Segments
        from farthing.train.losses import token_logprobs

        size = self.size
        segments = Segments([(size.prompt, [size.answer] * size.group)] * questions)
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(size.vocabulary, (segments.tokens,), generator=draw)
        positions = segments.positions()
        rows = torch.arange(segments.tokens) % (size.prompt + size.group * size.answer) >= size.prompt

        def work() -> None:
            hidden = self.decoder.hidden(ids, positions, segments)
            (-token_logprobs(hidden[rows], self.decoder.head.weight, ids[rows])).mean().backward()

        return lambda: machine.timed(work)

    def update(self) -> float:
        """Clipping and a step."""

        def work() -> None:
            self.weights.clip(1.0)
            self.weights.step(1e-9)

        return machine.timed(work)


def worked_out(dtype: str, rate: float, copied: float, small: float) -> tuple[dict[str, Pace], float]:
    """The figures of a network that was not timed: products at the middle of what is usual; for every layer its
    weights, once forward and three times more in training, and its launches. And 36 bytes a parameter of the optimizer.

    Args:
        rate: of products, in FLOP/s.
        copied: bytes a second of memory.
        small: seconds of an operation on next to nothing.
    """
    layer = parameters(SIZES[0].config(2)).total - parameters(SIZES[0].config(1)).total
    weights = WIDTH[precision_of(dtype)] * layer / copied
    flop, launches = sum(USUAL) / 2 / rate, LAUNCHES * small
    paces = {
        kind: Pace(launches + times * weights, flop, launches, flop)
        for kind, times in (("prefill", 1), ("decode", 1), ("train", 4))
    }
    return paces, 36 / copied


def solve(kind: str, size: Size, seconds: Times, rate: float) -> Pace:
    """The four figures from two depths and two numbers of rows; `rate` is that of products, in FLOP/s."""
    few, many = size.questions
    shallow, deep = size.depths
    a_layer = {
        q: (seconds[kind, deep, q] - seconds[kind, shallow, q]) / (deep - shallow) for q in size.questions
    }
    rest = {q: seconds[kind, shallow, q] - shallow * a_layer[q] for q in size.questions}
    bounds = BOUNDS if size.tokens >= ENOUGH else USUAL

    def line(y: dict[int, float], head: bool) -> tuple[float, float]:
        x = {q: size.flops(kind, 1, q, head) for q in size.questions}
        return _line(x[few], y[few], x[many], y[many], (bounds[0] / rate, bounds[1] / rate))

    return Pace(*line(a_layer, False), *line(rest, True))


def _line(x0: float, y0: float, x1: float, y1: float, slopes: tuple[float, float]) -> tuple[float, float]:
    """Intercept and slope of the line through two points, or through the second, which is the surer one.

    The intercept is never negative, and the slope within bounds: a plan goes far beyond few rows, and what noise there
    is in their difference would go with it.
    """
    slope = min(max((y1 - y0) / (x1 - x0), slopes[0]), slopes[1])
    return max(0.0, y1 - slope * x1), slope
