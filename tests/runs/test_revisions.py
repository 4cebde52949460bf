"""A run that goes on reads the revision of a hub's dataset with which it began."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.data.text import pinned, pinned_revision
from farthing.runs.revisions import Revisions
from farthing.tasks.table import Columns, table


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the hub: a dataset with a row for each revision, the newest last; "asked" counts questions."""
    import datasets
    import huggingface_hub

    state: dict[str, Any] = {"revisions": ["aaa"], "asked": 0, "read": []}

    def info(self: object, name: str, revision: str | None = None, timeout: float = 0) -> Any:
        state["asked"] += 1
        if not state["revisions"]:
            raise ConnectionError
        return SimpleNamespace(sha=revision or state["revisions"][-1], card_data=None)

    def load(name: str, config: str | None, *, revision: str | None = None, **_: Any) -> Any:
        found = revision or state["revisions"][-1]
        state["read"].append(revision)
        rows = [{"question": f"{number} in {found}?", "answer": str(number)} for number in range(3)]
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return state


def test_a_continued_run_reads_what_it_began_with(hub: dict[str, Any], tmp_path: Path) -> None:
    source = "hf:owner/name:test"

    def first() -> str:
        return table(source, Columns(), "tasks").asked(0).question

    with pinned(Revisions(tmp_path).of):
        assert first() == "0 in aaa?"
    hub["revisions"].append("bbb")
    with pinned(Revisions(tmp_path).of):  # a later attempt
        assert first() == "0 in aaa?"
    assert hub["asked"] == 1
    assert first() == "0 in bbb?"  # outside of a run
    with pinned(Revisions(tmp_path / "other").of):
        assert pinned_revision("hf:owner/name@v1") == "v1"


def test_a_hub_that_does_not_answer_pins_nothing(hub: dict[str, Any], tmp_path: Path) -> None:
    hub["revisions"] = []
    revisions = Revisions(tmp_path)
    assert revisions.of("hf:owner/name") is None
    assert revisions.of("hf:owner/name") is None
    assert hub["asked"] == 1
    assert not (tmp_path / "hub.json").exists()


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "hub.json").write_text('{"hf:owner/name": 3}')
    with pytest.raises(UserError, match=r"hub\.json is damaged: a revision is no text; put it back"):
        Revisions(tmp_path)
