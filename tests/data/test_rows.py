"""Rows from every kind of table, and what is said about those that are none."""

import datetime
import gzip
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.rows import check_source, rows
from farthing.data.text import Problems, hub_name

ROWS = [{"question": "3 + 4?", "answer": 7}, {"question": "ü\n→ 2", "answer": 2}]


def read(source: Path | str) -> tuple[list[dict[str, Any]], list[str], set[str]]:
    said: list[str] = []
    ignored: set[str] = set()
    found = [row for row, _ in rows(str(source), Problems("skip", said.append), ignored)]
    return found, said, ignored


def lines(table: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in table)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    (tmp_path / "c.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "d.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "e.json").write_text(lines(ROWS))  # JSON lines under the wrong name
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    (tmp_path / "g.json").write_text(json.dumps(columns))  # as datasets' to_dict
    (tmp_path / "h.json").write_text(
        json.dumps({n: dict(enumerate(c)) for n, c in columns.items()})
    )  # pandas' to_json
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "f.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path) == (ROWS, [], set()), path.name


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_csv_by_its_delimiter(tmp_path: Path, name: str, mark: str) -> None:
    quoted = mark.join(('"3 + 4, or\n""5""; 6?"', "7"))
    (tmp_path / name).write_text(f"\ufeffquestion{mark}answer\r\n{quoted}\r\n\r\nwhat{mark}2\n")
    expected = [{"question": '3 + 4, or\n"5"; 6?', "answer": "7"}, {"question": "what", "answer": "2"}]
    assert read(tmp_path / name) == (expected, [], set())


@pytest.mark.parametrize("header", ["a\rb", '"a;b;c",d', "a\0,b", '"a'])
def test_an_odd_header_is_read_or_refused(tmp_path: Path, header: str) -> None:
    (tmp_path / "a.csv").write_bytes(f"{header}\n1,2\n".encode())
    found, _, _ = read(tmp_path / "a.csv")
    assert found in ([{"a": "b"}], [{"a;b;c": "1", "d": "2"}], [{"a\0": "1", "b": "2"}], [])


def test_a_folder_is_its_files_by_name_and_json_beside_tables_describes_them(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_text(lines(ROWS[1:]))
    (tmp_path / "a.jsonl").write_text(lines(ROWS[:1]))
    (tmp_path / "dataset_infos.json").write_text('{"features": {}}')
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / ".hidden.jsonl").write_text("nonsense")
    assert read(tmp_path) == (ROWS, [], set())


def test_what_json_has_no_form_for_is_left_out_of_its_row_and_named(tmp_path: Path) -> None:
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table(
        {
            "question": ["what is on it?"],
            "image": pyarrow.array([{"bytes": b"\x89PNG", "path": "a.png"}], picture),
            "images": pyarrow.array([[{"bytes": b"\x89PNG", "path": "a.png"}]], pyarrow.list_(picture)),
            "when": [datetime.date(2026, 1, 2)],
            "price": [Decimal("1.50")],
            "share": [math.nan],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found, said, ignored = read(tmp_path / "a.parquet")
    assert found == [{"question": "what is on it?", "when": "2026-01-02", "price": "1.50", "share": None}]
    assert ignored == {"image", "images"}
    assert said == []


def test_a_hubs_rows_lose_what_is_no_text_or_number(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "q": "?",
        "n": np.int64(3),
        "v": np.array([1, 2]),
        "image": object(),
        "deep": {"b": b"x"},
        "bad": "\ud800",
    }
    monkeypatch.setattr("farthing.data.text._hub_rows", lambda source: iter([(given, f"{source}:1")]))
    assert read("hf:a/b") == ([{"q": "?", "n": 3, "v": [1, 2]}], [], {"image", "deep", "bad"})


BROKEN = {
    "a.jsonl": (
        '{"a": 1}\n[1]\nnonsense\n',
        ["a.jsonl:2: the row is a list", "a.jsonl:3: the line is not JSON"],
    ),
    "a.json": ('[{"a": 1}, 3]', ["a.json:2: the row is a number"]),
    "a.csv": (
        "a,b\n1,2\n1,2,3\n1\n",
        ["a.csv:3: the row has 3 cells", "a.csv:4: the row has 1 cells"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_row_is_said_with_its_place(tmp_path: Path, name: str) -> None:
    text, expected = BROKEN[name]
    (tmp_path / name).write_text(text)
    found, said, _ = read(tmp_path / name)
    assert len(found) == 1
    assert [begun for begun, whole in zip(expected, said, strict=True) if whole.startswith(begun)] == expected


REFUSED = {
    "a.json": ("{", "is not JSON"),
    "c.json": ("9" * 5000, "is not JSON"),
    "d.json": ("[" * 100_000, "is not JSON"),
    "b.csv": ("a,a\n1,2\n", "two columns have the same name"),
    "a.xlsx": ("x", "of no kind Farthing reads"),
    "absent.jsonl": (None, "does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_read_at_all_is_refused(tmp_path: Path, name: str) -> None:
    text, why = REFUSED[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=why):
        read(tmp_path / name)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no file that Farthing reads"):
        check_source(str(tmp_path))


@given(
    st.binary(max_size=200),
    st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"]),
)
def test_any_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / name
    path.write_bytes(content)
    said = ""
    try:
        json.dumps(read(path)[0])
    except UserError as error:
        said = str(error)
    assert "\n" not in said


# ---- the hub ----


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:openai/gsm8k", ("openai/gsm8k", None, None, "train")),
        ("hf:openai/gsm8k/main:test", ("openai/gsm8k", "main", None, "test")),
        ("hf:openai/gsm8k:main:test", ("openai/gsm8k", "main", None, "test")),
        ("hf:a/b.c:test", ("a/b.c", None, None, "test")),
        ("hf:a/b/c-d@1f2e:test", ("a/b", "c-d", "1f2e", "test")),
        ("hf:a/b@refs/pr/1:x:test", ("a/b", "x", "refs/pr/1", "test")),
    ],
)
def test_a_dataset_by_either_form_of_its_name(source: str, parts: tuple[str | None, ...]) -> None:
    name = hub_name(source)
    assert (name.name, name.config, name.revision, name.split) == parts
    check_source(source)


@pytest.mark.parametrize("source", ["hf:", "hf:alone", "hf:a/b/c:d:e", "hf:a/b:c:d:e", "hf:a b/c", "hf:a/b:"])
def test_what_names_no_dataset_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="names no dataset"):
        check_source(source)


def test_pictures_of_a_hubs_dataset_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"q": datasets.Value("string"), "image": datasets.Image()})
    broken = {"bytes": b"no picture", "path": None}
    table = pyarrow.table({"q": ["?"], "image": pyarrow.array([broken], features["image"].pa_type)})
    made = datasets.Dataset(table.cast(features.arrow_schema)).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    assert read("hf:a/b") == ([{"q": "?"}], [], {"image"})
