"""Times of a recipe's work, on a measured machine or on a device of the catalogue.

All times are of one device. `Measured` uses what `farthing calibrate` found; `Catalogued` uses a device's
figures: reading the weights for every token, products at the fitted efficiency, a launch for every small operation,
and the host's scheduling between passes. The second is a guess, and its range says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from farthing.cost.devices import Device, peak
from farthing.cost.flops import flops_per_token, forward_flops, parameters
from farthing.cost.memory import WIDTH, cache_bytes_per_token, precision_of
from farthing.cost.shapes import shapes
from farthing.plans import narrow
from farthing.plans.efficiency import conditions, efficiency
from farthing.plans.measured import Calibration
from farthing.recipe.work import Config

LAUNCHES = 14  # operations that one layer launches, forward
LAUNCH = 8e-6  # seconds each from Python; assumed, not measured
READ = 0.7  # of a GPU's bandwidth that decoding reaches; assumed
HOST = (
    29 / 38
)  # of the device's time that the host adds to a decoding pass: vLLM 0.5.3's profile (blog, 2024-09-05)
ENOUGH = 400  # tokens of a pass that was timed, to tell what larger ones take; assumed
LENGTH = 1024  # tokens of a sequence that a catalogued device's rate is that of; assumed
DISK = 1e9  # bytes a second, where no disk was measured; assumed


class Speed(Protocol):
    """Times of a machine, in seconds."""

    @property
    def dtype(self) -> str:
        """Dtype of products: `bfloat16` or `float32`."""

    @property
    def uncertainty(self) -> float:
        """Factor by which times may be off, either way."""

    def decode(self, config: Config, rows: float, context: float) -> float:
        """One more token for each of `rows` sequences of about `context` tokens."""

    def prefill(self, config: Config, tokens: float, pairs: float, scored: float) -> float: ...

    def train(self, config: Config, tokens: float, pairs: float, scored: float) -> float:
        """Forward and backward pass."""

    def optimizer(self, trained: float, products: float = 0.0) -> float:
        """One step over so many parameters; `products` are the FLOPs of Muon's."""

    def write(self, size: float) -> float:
        """A checkpoint of so many bytes."""


@dataclass(frozen=True)
class Measured:
    """A machine that `farthing calibrate` has measured."""

    calibration: Calibration

    @property
    def dtype(self) -> str:
        return self.calibration.dtype

    @property
    def uncertainty(self) -> float:
        """As large passes were seen to be off; more where only small ones were timed, or none. The latter are
        assumed."""
        return 1.15 if self.calibration.timed >= ENOUGH else 1.35 if self.calibration.timed else 2.0

    def decode(self, config: Config, rows: float, context: float) -> float:
        return self._pass("decode", config, rows, rows * (context + 1), rows)

    def prefill(self, config: Config, tokens: float, pairs: float, scored: float) -> float:
        return self._pass("prefill", config, tokens, pairs, scored)

    def train(self, config: Config, tokens: float, pairs: float, scored: float) -> float:
        return self._pass("train", config, tokens, pairs, scored)

    def optimizer(self, trained: float, products: float = 0.0) -> float:
        found = self.calibration
        rate = found.gemm_float32 if self.dtype == "float32" else found.gemm_bfloat16
        return found.optimizer * trained + products / rate

    def write(self, size: float) -> float:
        return size / self.calibration.disk

    def _pass(self, kind: str, config: Config, tokens: float, pairs: float, scored: float) -> float:
        times = 3 if kind == "train" else 1
        inside, head = _work(config, tokens, pairs, scored, absorbed=kind == "decode")
        s, found, pace = shapes(config), self.calibration, getattr(self.calibration, kind)
        pace = replace(pace, flop=narrow.pace(pace.flop, found.narrow, s.width))
        routed = tokens * found.route * sum(layer.sparse for layer in s.layers) * times / 3
        return float(pace.seconds(len(s.layers), times * inside, times * head)) + routed


@dataclass(frozen=True)
class Catalogued:
    """A device of the catalogue, not measured with this program."""

    device: Device
    dtype: str = "bfloat16"
    uncertainty: float = 1.6

    def decode(self, config: Config, rows: float, context: float) -> float:
        inside, head = _work(config, rows, rows * (context + 1), rows, absorbed=True)
        precision = precision_of(self.dtype)
        read = float(WIDTH[precision] * parameters(config).active)
        read += rows * context * cache_bytes_per_token(config, precision)
        bound = max(read / (READ * self.device.bytes_per_second), (inside + head) / self._rate(config))
        return (bound + self._launches(config)) * (1 + HOST)

    def prefill(self, config: Config, tokens: float, pairs: float, scored: float) -> float:
        return sum(_work(config, tokens, pairs, scored)) / self._rate(config) + self._launches(config)

    def train(self, config: Config, tokens: float, pairs: float, scored: float) -> float:
        work = 3 * sum(_work(config, tokens, pairs, scored))
        return work / self._rate(config) + 3 * self._launches(config)

    def optimizer(self, trained: float, products: float = 0.0) -> float:
        """Reads gradient, master and moments, writes master, moments and weights: 30 bytes a parameter."""
        return 30 * trained / (READ * self.device.bytes_per_second) + products / (READ * peak(self.device))

    def write(self, size: float) -> float:
        return size / DISK

    def _rate(self, config: Config) -> float:
        per_token = flops_per_token(config, LENGTH)
        reached = efficiency(conditions(config, per_token, self.device, 1, seq_len=LENGTH))
        rate = reached.likely * peak(self.device)
        if self.dtype == "float32":
            rate *= min(1.0, self.device.peak_flops.get("float32", peak(self.device) / 2) / peak(self.device))
        return rate

    def _launches(self, config: Config) -> float:
        return len(shapes(config).layers) * LAUNCHES * LAUNCH


def _work(
    config: Config, tokens: float, pairs: float, scored: float, *, absorbed: bool = False
) -> tuple[float, float]:
    """FLOPs of one forward pass inside the layers, and in the head."""
    whole, seen = round(tokens), round(pairs)
    return (
        forward_flops(config, whole, seen, 0, absorbed=absorbed),
        forward_flops(config, 0, 0, round(scored)),
    )
