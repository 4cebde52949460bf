"""Memory that runs out is one sentence with what was being done, what is needed and what would fit."""

import re
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import farthing
from farthing.base import machine
from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.cost import room
from farthing.cost.room import could_be_had, room_for, room_to_read
from farthing.weights.folder import write_tensors

CONFIG = {
    "model_type": "llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 2048,
}  # fmt: skip
MESSAGES = [
    MemoryError(), OSError(12, "Cannot allocate memory"), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("unable to mmap 269060552 bytes from file <m>: Cannot allocate memory (12)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:98] DefaultCPUAllocator: can't allocate memory"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The config of a model of 6.7 billion parameters, and two small tensors."""
    write_json(tmp_path / "config.json", CONFIG)
    write_tensors(tmp_path, [("a", torch.zeros(10, 10)), ("b", torch.zeros(3))])
    return tmp_path


def said(context: Callable[[], object], error: Exception) -> str:
    with pytest.raises(UserError) as caught, context():  # type: ignore[attr-defined]
        raise error
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("error", MESSAGES)
def test_a_model_that_is_too_large(error: Exception, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "could_be_had", lambda _: 4_000_000_000)
    message = said(lambda: room_for("loading x", folder, "cpu", "bfloat16"), error)
    assert message.startswith(
        "loading x ran out of memory on cpu, where 4 GB could be had; the model needs about "
    )
    assert "for 2,048 tokens" in message
    fits = re.search(r"up to about ([0-9.]+)(M|B) parameters would fit", message)
    assert fits
    assert 0.1e9 < float(fits[1]) * {"M": 1e6, "B": 1e9}[fits[2]] < 2e9


def test_a_model_that_would_fit_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "could_be_had", lambda _: 10**12)
    message = said(lambda: room_for("talking to x", folder), MemoryError())
    assert message.endswith("close other programs, or ask for less at once")


@pytest.mark.parametrize("config", [{}, {"model_type": "mamba"}, None])
def test_a_model_of_which_nothing_is_known(config: dict[str, str] | None, tmp_path: Path) -> None:
    if config is not None:
        write_json(tmp_path / "config.json", config)
    assert "take a smaller model" in said(lambda: room_for("loading x", tmp_path), MemoryError())
    assert "close other programs" in said(lambda: room_to_read("exporting x", tmp_path), MemoryError())
    assert "take a smaller model" in said(lambda: room_for("loading x", None), MemoryError())


def test_tensors_that_are_read_one_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = said(lambda: room_to_read("exporting x", folder), MemoryError())
    assert "the largest takes 400 bytes in float32: close other programs" in message
    monkeypatch.setattr(room, "could_be_had", lambda _: 200)
    assert "one of up to 50 numbers would fit" in said(
        lambda: room_to_read("exporting x", folder), MemoryError()
    )


def test_other_errors_pass(folder: Path) -> None:
    for context in (room_for("x", folder), room_to_read("x", folder)):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError


def test_loading_says_so(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("farthing.engine.model.load_decoder", full)
    with pytest.raises(
        UserError, match=r"^loading .* ran out of memory on cpu, where .* the model needs about"
    ):
        farthing.load(tiny_model)


def test_a_limit_on_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = could_be_had("cpu")
    used = machine._address_space()
    assert used > 10_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 12_345_678, resource.RLIM_INFINITY))
    monkeypatch.setattr(machine, "_address_space", lambda: used)
    assert machine.memory_left() == 12_345_678
    assert could_be_had("cpu") < before
