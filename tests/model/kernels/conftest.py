"""Decisions made under one test's torch are forgotten before the next."""

from collections.abc import Iterator

import pytest

from farthing.model import kernels


@pytest.fixture(autouse=True)
def decided_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FARTHING_KERNELS", raising=False)
    kernels.forget()
    yield
    monkeypatch.undo()
    kernels.forget()
