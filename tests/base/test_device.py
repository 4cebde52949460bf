"""One place decides device and dtype: what it chooses on machines of several kinds, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from farthing.base import device, processor
from farthing.base.device import Place, check_device, choose
from farthing.base.errors import UserError


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    device._fastest.cache_clear()
    yield
    device._fastest.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, isa: str, bfloat16: float = 1.0, float32: float = 1.0) -> None:
    """A CPU with these instructions, on which products run at these FLOP/s."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processor, "isa", lambda: isa)
    rates = {"bfloat16": bfloat16 * 1e9, "float32": float32 * 1e9}
    monkeypatch.setattr(device, "product_rates", lambda *_: rates)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)


def test_float32_without_instructions_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2", bfloat16=999)  # whatever a probe says
    assert choose() == Place("cpu", "float32", "avx2 has no instructions for bfloat16")
    assert choose().torch_dtype == torch.float32


@pytest.mark.parametrize("isa", sorted(processor.BFLOAT16))
def test_with_instructions_the_faster_one(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, isa, bfloat16=400, float32=180)
    assert choose() == Place("cpu", "bfloat16", "products: bfloat16 400 GFLOPS, float32 180")
    device._fastest.cache_clear()
    pretend(monkeypatch, isa, bfloat16=90, float32=180)
    assert choose().dtype == "float32"


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2")
    assert choose("cpu", "bfloat16") == Place("cpu", "bfloat16", "asked for")
    pretend_gpus(monkeypatch, 2)
    assert choose("auto", "float32").device == "cuda:0"
    assert choose("cuda", "float32").device == "cuda:0"
    assert choose("cuda:1", "float32").device == "cuda:1"
    assert choose("cpu", "float32").device == "cpu"


def test_a_gpu_is_asked_for_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "avx2", bfloat16=2, float32=1)
    pretend_gpus(monkeypatch, 1)
    assert choose() == Place("cuda:0", "bfloat16", "products: bfloat16 2 GFLOPS, float32 1")
    device._fastest.cache_clear()
    pretend_gpus(monkeypatch, 1, (7, 5))
    assert choose().dtype == "float32"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dtype": "fp8"}, "dtype: must be auto, bfloat16 or float32, got 'fp8'; did you mean bfloat16?"),
        ({"dtype": "float"}, "got 'float'; did you mean float32?"),
        ({"dtype": "float64"}, "got 'float64'; did you mean float32?"),
        ({"dtype": "floot32"}, "got 'floot32'; did you mean float32?"),
        ({"device": "tpu"}, "device: must be auto, cpu, cuda or cuda:N, got 'tpu'; did you mean cpu?"),
        ({"device": "gpu"}, "got 'gpu'; did you mean cuda?"),
        ({"device": "cuda:x"}, "got 'cuda:x'; did you mean cuda?"),
        ({"device": "cuda"}, "device: cuda, but .*; use device: cpu"),
        ({"device": "cuda:0"}, "device: cuda:0, but .*; use device: cpu"),
    ],
)
def test_a_name_that_cannot_be_is_refused(
    given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "avx2")
    with pytest.raises(UserError, match=said):
        choose(**given)


def test_a_gpu_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="device: cuda:2, but there are 2 GPUs, numbered from 0; use cuda:1"):
        choose("cuda:2")


def test_avx_ne_convert_is_asked_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FARTHING_ISA", raising=False)
    pretend(monkeypatch, "avx2", bfloat16=2, float32=1)  # which is all that Linux says of such a processor
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx_ne_convert": True}, raising=False)
    assert choose("cpu").dtype == "bfloat16"
    device._fastest.cache_clear()
    monkeypatch.setenv("FARTHING_ISA", "avx2")
    assert choose("cpu").dtype == "float32"


def test_a_gpus_unused_share_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 50)
    assert device.free_memory("cuda:0") == 750


def test_names_are_checked_without_looking_for_them() -> None:
    assert [check_device(name) for name in ("auto", "cpu", "cuda", "cuda:7")][-1] == "cuda:7"


def test_the_probe_measures_both_dtypes() -> None:
    rates = device.product_rates("cpu", seconds=0.001)
    assert set(rates) == {"bfloat16", "float32"}
    assert all(1e6 < rate < 1e16 for rate in rates.values())


def test_free_memory_heeds_a_containers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_left", lambda: 690_000.0)
    assert device.free_memory("cpu") == 690_000
    monkeypatch.setattr(device, "memory_left", lambda: float("inf"))
    assert device.free_memory("cpu") > 1_000_000


def test_kernels_are_auto_or_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("", False), ("auto", False), ("reference", True)):
        monkeypatch.setenv("FARTHING_KERNELS", value)
        assert device.reference_only() is expected
    monkeypatch.setenv("FARTHING_KERNELS", "fast")
    with pytest.raises(UserError, match="FARTHING_KERNELS=fast: must be auto or reference"):
        device.reference_only()
