"""Documents from every kind of source, and what is said about broken ones."""

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.data.text import Document, Policy, Problems, documents, records


def read(
    source: Path | str, policy: Policy = "skip", field: str = "text"
) -> tuple[list[Document], list[str]]:
    said: list[str] = []
    return list(documents(str(source), field=field, policy=policy, on_problem=said.append)), said


def lines(*rows: Any) -> bytes:
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_bytes(lines(*({"text": text} for text in texts)))
    return path


def write_gz(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress(lines(*({"text": text} for text in texts))))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"n": range(len(texts)), "text": texts}), path)
    return path


KINDS: dict[str, Callable[[Path, list[str]], Path]] = {
    "a.jsonl": write_jsonl, "a.jsonl.gz": write_gz, "a.parquet": write_parquet,
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_texts_in_order_with_their_places(name: str, tmp_path: Path) -> None:
    texts = [f"text {n} é 日本\n\twith lines" for n in range(700)]  # more than one batch of a parquet file
    found, said = read(KINDS[name](tmp_path / name, texts), "stop")
    assert [document.text for document in found] == texts
    assert [document.place for document in found] == [f"{name}:{n}" for n in range(1, 701)]
    assert said == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_a_text_comes_back_as_it_was_but_for_its_line_ends(texts: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, write in KINDS.items():
            found, said = read(write(Path(folder) / name, texts))
            kept = [text for text in texts if text.strip()]
            assert [document.text for document in found] == [
                text.replace("\r\n", "\n").replace("\r", "\n") for text in kept
            ]
            assert sum("empty" in line for line in said) == len(texts) - len(kept)
            assert sum("line ends" in line for line in said) == any("\r" in text for text in kept)


BROKEN = {
    "json": (b'{"text": "cut off\n', "the line is not JSON"),
    "nested": (b"[" * 100_000 + b"\n", "the line is not JSON"),
    "utf8": (b'{"text": "caf\xe9"}\n', "the line is not UTF-8"),
    "no object": (b'"a text"\n', "the row is a text where a JSON object belongs"),
    "field": (b'{"title": 1, "body": 2}\n', "the row has no 'text' (it has 'title', 'body')"),
    "null": (b'{"text": null}\n', "its 'text' is null where a text belongs"),
    "number": (b'{"text": 3}\n', "its 'text' is a number where a text belongs"),
    "empty": (b'{"text": " \\n\\t"}\n', "the document is empty"),
    "surrogate": (b'{"text": "\\ud800"}\n', "half a character"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_named_by_file_and_line(name: str, tmp_path: Path) -> None:
    line, what = BROKEN[name]
    path = tmp_path / "books.jsonl"
    path.write_bytes(lines({"text": "one"}, b"\n", line, {"text": "two"}))
    found, [said] = read(path, "skip")
    assert [document.text for document in found] == ["one", "two"]
    assert said.startswith("books.jsonl:3: ")
    assert what in said
    assert said.endswith("left out")
    with pytest.raises(UserError, match=r"^books\.jsonl:3: ") as raised:
        read(path, "stop")
    assert what in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_comes_before_a_broken_row_is_given_out_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "one"}, b"{\n"))
    stream = documents(str(tmp_path / "a.jsonl"), on_problem=pytest.fail)
    assert next(stream).text == "one"
    with pytest.raises(UserError, match=r"^a\.jsonl:2: "):
        next(stream)


def test_rows_may_end_in_any_way_and_that_is_said_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "two\\r\\nlines"}\r\n{"text": "three"}\r{"text": "four"}')
    found, said = read(path, "stop")
    assert [(document.text, document.place) for document in found] == [
        ("one", "a.jsonl:1"), ("two\nlines", "a.jsonl:2"), ("three", "a.jsonl:3"), ("four", "a.jsonl:4"),
    ]  # fmt: skip
    [line] = said
    assert line.startswith("a.jsonl:2: has line ends other than \\n")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"text": "one"}))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftwo\r\nlines\rhere")
    found, said = read(tmp_path, "stop")
    assert [document.text for document in found] == ["one", "two\nlines\nhere"]
    assert len(said) == 1


def test_a_text_file_is_one_document_and_its_bad_byte_has_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\n\nsecond é".encode())
    assert read(tmp_path / "a.txt") == ([Document("first\n\nsecond é", "a.txt:1")], [])
    (tmp_path / "a.txt").write_bytes(b"1\r\n2\r3\n4 \xff\n")
    found, said = read(tmp_path / "a.txt")
    assert found == []
    assert said == ["a.txt:4: the line is not UTF-8; left out"]


def test_a_folder_is_read_by_name_and_hidden_or_other_files_are_left_alone(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    (corpus / "more").mkdir(parents=True)
    (corpus / ".git").mkdir()
    write_jsonl(corpus / "b.jsonl", ["b"])
    (corpus / "a.txt").write_text("a")
    write_parquet(corpus / "more" / "c.parquet", ["c"])
    for other in ("x.json", ".hidden.txt", ".git/y.txt", "model.bin"):
        (corpus / other).write_text("no")
    found, _ = read(corpus, "stop")
    assert [(document.text, document.place) for document in found] == [
        ("a", "corpus/a.txt:1"), ("b", "corpus/b.jsonl:1"), ("c", "corpus/more/c.parquet:1"),
    ]  # fmt: skip


def test_a_parquet_file_with_bad_values_or_bad_bytes(tmp_path: Path) -> None:
    raw = pyarrow.array([b"good", b"bad \xff", None, b"fine"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": raw}), path)
    found, said = read(path)
    assert [(document.text, document.place) for document in found] == [
        ("good", "a.parquet:1"), ("fine", "a.parquet:4"),
    ]  # fmt: skip
    assert [line.partition(": ")[0] for line in said] == ["a.parquet:2", "a.parquet:3"]
    assert read(path, field="body")[1] == [
        "a.parquet:1: the file has no column 'body' (it has 'text'); left out"
    ]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet:1: the parquet file is damaged"):
        read(path, "stop")


def test_a_packed_file_that_was_cut_short_gives_what_it_can(tmp_path: Path) -> None:
    path = write_gz(tmp_path / "a.jsonl.gz", [f"{n} " * 50 for n in range(500)])
    path.write_bytes(path.read_bytes()[:-200])
    found, said = read(path)
    assert 0 < len(found) < 500
    assert said[-1].startswith(f"a.jsonl.gz:{len(found) + 1}: the file cannot be decompressed any further")


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("a.xlsx", "a.xlsx is of no kind Farthing reads; give one of .jsonl"),
        ("empty", "empty holds no file that Farthing reads"),
        ("hf:nothing", "hf:nothing names no dataset"),
    ],
)
def test_a_source_that_is_none(
    source: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.xlsx").write_text("text\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=what):
        read(source)


def test_there_is_no_third_policy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="policy: there is no 'ignore'; choose skip or stop"):
        read(write_jsonl(tmp_path / "a.jsonl", ["a"]), "ignore")  # type: ignore[arg-type]


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.IterableDataset.from_generator(
            lambda: iter([{"text": "one"}, {"text": ""}, {"text": "two"}])
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    found, said = read("hf:owner/name/part@v1:train")
    assert [(document.text, document.place) for document in found] == [
        ("one", "hf:owner/name/part@v1:train:1"), ("two", "hf:owner/name/part@v1:train:3"),
    ]  # fmt: skip
    assert len(said) == 1
    assert asked == [
        (("owner/name", "part"), {"split": "train", "revision": "v1", "streaming": True}),
    ]  # fmt: skip
    read("hf:owner/name")
    assert asked[1] == (("owner/name", None), {"split": "train", "revision": None, "streaming": True})


def test_a_dataset_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"hf:owner/name cannot be read from the hub \(no route to the hub\)"):
        read("hf:owner/name")


@pytest.mark.parametrize(("source", "package"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_package_that_is_not_installed_is_named(
    source: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        UserError, match=rf"{source} needs {package} to be read; pip install 'farthing\[data\]'"
    ):
        read(source)


# ---- tables and single JSON files ----


def rows_of(path: Path, policy: Policy = "skip") -> tuple[list[tuple[dict[str, Any], str]], list[str]]:
    said: list[str] = []
    return list(records(str(path), None, Problems(policy, said.append))), said


def test_a_table_gives_a_row_a_line_under_its_header(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffquestion,answer\n"one, two",1\n"three\nfour",2\n\nalone\n', encoding="utf-8")
    found, said = rows_of(path)
    assert [row for row, _ in found] == [
        {"question": "one, two", "answer": "1"},
        {"question": "three\nfour", "answer": "2"},
    ]
    assert said == ["a.csv:6: the row has 1 cells where the header has 2; left out"]
    (tmp_path / "b.tsv").write_text("text\tn\nhello, you\t1\n")
    assert [document.text for document in read(tmp_path / "b.tsv", "stop")[0]] == ["hello, you"]
    (tmp_path / "c.csv").write_bytes(b"text\nfine\n\xff\n")
    assert rows_of(tmp_path / "c.csv")[1] == ["c.csv:3: the row is not UTF-8; left out"]
    (tmp_path / "d.csv").write_text("a,a\n1,2\n")
    with pytest.raises(UserError, match="two columns have the same name"):
        rows_of(tmp_path / "d.csv")


TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('[{"text": "a"}, {"text": "b"}]', [{"text": "a"}, {"text": "b"}]),
        ('{"version": 2, "data": [{"text": "a"}]}', [{"text": "a"}]),
        ('{"text": "a", "n": [1]}', [{"text": "a", "n": [1]}]),
        ('{"text": "a"}\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        (json.dumps({"messages": TURNS}), [{"messages": TURNS}]),
    ],
)
def test_a_json_file_is_a_list_or_holds_one_or_is_a_row(text: str, wanted: list[Any], tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    found, said = rows_of(tmp_path / "a.json", "stop")
    assert [row for row, _ in found] == wanted
    assert [place for _, place in found] == [f"a.json:{n}" for n in range(1, len(wanted) + 1)]
    assert said == []


def test_a_json_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "a"},\n oops]')
    with pytest.raises(UserError, match=r"a\.json is not JSON \(Expecting value in line 2\)"):
        rows_of(tmp_path / "a.json")


def test_a_folder_of_other_kinds_is_read_without_its_tables(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "scores.csv").write_text("text\nno\n")
    assert [document.text for document in read(tmp_path, "stop")[0]] == ["a"]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "dataset_info.json").unlink()
    assert [document.text for document in read(tmp_path, "stop")[0]] == ["no"]


def test_what_a_parquet_table_fills_up_is_not_there(tmp_path: Path) -> None:
    rows = [{"calls": [{"arguments": {"city": "Rome"}}]}, {"calls": [{"arguments": {"day": 1}}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row for row, _ in rows_of(tmp_path / "a.parquet", "stop")[0]] == rows
