"""Drops cached kernel decisions between tests, because each test may change torch."""

from collections.abc import Iterator

import pytest

from farthing.model import kernels


@pytest.fixture(autouse=True)
def fresh_decisions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FARTHING_KERNELS", raising=False)
    kernels.forget()
    yield
    monkeypatch.undo()
    kernels.forget()
