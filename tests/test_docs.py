"""The documentation is in step with the code: keys, defaults, options, tasks, and every command it shows."""

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from typer.testing import CliRunner

from farthing import recipe
from farthing.cli import app
from farthing.recipe import rewards
from farthing.tasks.gym import SCORERS
from farthing.tasks.sets import SETS

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if path.name != "log.md")
GROUP = typer.main.get_command(app)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """The text from a second-level heading to the next."""
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def shown_commands() -> list[str]:
    blocks = [
        block
        for name in PAGES
        for block in re.findall(r"```(?:console|bash)\n(.*?)```", page(name), flags=re.S)
    ]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines = [
        line for line in lines if not line.startswith(("docker ", "python "))
    ]  # tests/test_shown.py checks those
    return [line.split("| ")[-1] for line in lines if "farthing " in line]


MODELS = {
    "The recipe": recipe.Recipe,
    "`kind: pretrain`": recipe.Pretrain,
    "`kind: sft`": recipe.Sft,
    "Sources of data": recipe.Source,
    "`kind: grpo`": recipe.Grpo,
    "`evaluate`": recipe.Evaluate,
    "Tasks": recipe.TaskSetting,
}


@pytest.mark.parametrize("heading", MODELS)
def test_every_key_of_a_recipe_is_listed_with_its_default(heading):
    model: type[BaseModel] = MODELS[heading]
    listed = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", section(page("recipes.md"), heading), flags=re.M))
    fields = {name: field for name, field in model.model_fields.items() if name != "kind"}
    assert listed.keys() == fields.keys()
    for name, field in fields.items():
        if field.is_required():
            assert listed[name] == "required", name
            continue
        default = field.get_default(call_default_factory=True)
        assert default is not PydanticUndefined
        written = yaml.safe_load(listed[name].strip("`"))
        written = float(written) if isinstance(default, float) else written
        assert written == (list(default) if isinstance(default, tuple) else default), name


def test_every_built_in_recipe_and_every_supported_task_is_named():
    text = page("recipes.md")
    for name, _ in recipe.builtin():
        assert f"| `{name}` |" in text
    assert set(re.findall(r"`(\w+)`", section(text, "Generators"))) == set(SCORERS)
    named = re.findall(r"^\| `(\w+)` \|", section(text, "Question sets"), flags=re.M)
    assert {*named, "arc"} == set(SETS)


def test_every_command_and_option_is_listed_and_no_other():
    text = page("commands.md")
    headings = re.findall(r"^## `farthing (\w+)", text, flags=re.M)
    assert sorted(headings) == sorted(GROUP.commands)
    for name, command in GROUP.commands.items():
        part = re.split(r"\n## ", text.split(f"\n## `farthing {name}", 1)[1])[0]
        options = {
            option for parameter in command.params for option in parameter.opts if option.startswith("--")
        }
        assert set(re.findall(r"^\| `(--[\w-]+)", part, flags=re.M)) == options - {"--help"}, name


@pytest.mark.parametrize("line", shown_commands())
def test_every_command_shown_is_understood(line):
    words = shlex.split(line)
    assert words[0] == "farthing"
    if len(words) == 2 and words[1].startswith("--"):
        assert CliRunner().invoke(app, words[1:]).exit_code == 0
        return
    command = GROUP.commands[words[1]]
    command.make_context(words[1], words[2:])  # raises on an option that does not exist


def test_the_recipe_shown_is_one(tmp_path):
    [shown] = re.findall(r"```yaml\n(.*?)```", page("index.md"), flags=re.S)
    (tmp_path / "sums.yaml").write_text(shown)
    assert recipe.load(tmp_path / "sums.yaml").name == "sums"


@pytest.mark.parametrize(
    "line", [line for line in shown_commands() if "--dry-run" in line and "sums" not in line]
)
def test_a_dry_run_shown_works(line):
    assert CliRunner().invoke(app, shlex.split(line)[1:]).exit_code == 0


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([\w-]+\.md)?(?:#([\w-]+))?\)", page(name)):
        text = page(target or name)
        headings = [re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-")
                    for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)]  # fmt: skip
        assert not anchor or anchor in headings


def test_the_site_breaks_no_name_in_two():
    site = (DOCS.parent / "mkdocs.yml").read_text()
    [style] = re.findall(r"^extra_css:\n  - (\S+)$", site, flags=re.M)
    rules = dict(
        re.findall(r"([^{}/]+)\{([^}]*)\}", re.sub(r"/\*.*?\*/", "", (DOCS / style).read_text(), flags=re.S))
    )
    rules = {" ".join(chosen.split()): " ".join(said.split()) for chosen, said in rules.items()}
    assert "word-break: normal;" in rules[".md-typeset code"]
    assert rules[".md-typeset td code, .md-typeset th code"] == "overflow-wrap: normal;"
    assert "white-space: nowrap;" in rules[".md-typeset td:first-child code, .md-typeset th:first-child code"]


def test_every_reward_and_its_settings_are_named():
    text = section(page("recipes.md"), "Rewards")
    for name, model in {**rewards.VERIFIERS, **rewards.SHAPING}.items():
        assert f"| `{name}` |" in text, name
        for key, field in model.model_fields.items():
            assert f"`{field.alias or key}" in text, (name, key)
    assert all(f"`{key}" in text for key in rewards.Own.model_fields)
