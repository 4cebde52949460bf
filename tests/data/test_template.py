"""Templates that compute, take or write too much, and the process that keeps them apart."""

import gc
import os
import signal
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from farthing.base.errors import UserError
from farthing.data import template as module
from farthing.data.template import ChatTemplate, Unrenderable, chat_template

HELLO = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "é 日本 👩‍👧 \x00"}]}

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
GROWING = (
    "{{% set n = namespace(x={}) %}}{{% for i in range({}) %}}{{% set n.x = {} %}}{{% endfor %}}{{{{ {} }}}}"
)
BOMBS = {
    "nested ranges": LOOPS + "x" + ENDS,
    "nested ranges in an expression": "{% set n = namespace(x=0) %}"
    + LOOPS
    + "{% set n.x = n.x + 1 %}"
    + ENDS,
    "a macro that calls itself": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "two macros": "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a long text": "{{ 'a' * 10**9 }}",
    "a longer text": "{{ 'a' * 10**12 }}",
    "a long list": "{{ [0] * 10**9 }}",
    "a length alone": "{{ ('a' * 10**10) | length }}",
    "a doubling text": GROWING.format("'a'", 60, "n.x + n.x", "n.x"),
    "a doubling list": GROWING.format("[1]", 60, "n.x + n.x", "n.x"),
    "a text that is written again": "{% set x = 'a' * 10**6 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "a power": "{{ (10 ** (10 ** 10)) % 7 }}",
    "strftime": "{{ strftime_now('%c' * 10**6) }}",
    "strftime for longer": "{{ strftime_now('%A' * 10**8) }}",
    "a width": "{{ '%1000000000d' % 1 }}",
    "a format": "{{ '{:>1000000000}'.format(1) }}",
    "centred": "{{ 'a' | center(10**9) }}",
    "padding": "{{ 'a'.ljust(10**10) }}",
    "indenting": "{{ ('a\\n' * 10**6) | indent(10**5) }}",
    "replacing": "{{ ('a' * 10**5).replace('a', 'a' * 10**5) }}",
    "joining": "{{ range(99999) | join('a' * 10**5) }}",
    "batches": "{{ range(99999) | batch(10**9, 'x') | list }}",
    "slices": "{{ range(9) | slice(10**9) | list }}",
    "deep JSON": GROWING.format("[]", 99999, "[n.x]", "n.x | tojson"),
    "wide JSON": "{{ range(99999) | list | tojson(indent=10**6) }}",
    "an error": "{{ raise_exception('a' * 10**9) }}",
    "nested brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "nested blocks": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "nested loops": "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "a sum": "{{ " + "1+" * 50_000 + "1 }}",
    "a chain of attributes": "{{ messages" + ".a" * 50_000 + " }}",
    "a number": "{{ " + "9" * 50_000 + " }}",
    "a filter chain": "{{ 'a'" + "|trim" * 20_000 + " }}",
}


# each takes the five seconds that a template has; the rest are tried by `make test-slow`
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if number % 3 else []) for number, name in enumerate(BOMBS)],
)
def test_a_bomb_is_one_line(name: str) -> None:
    parent = psutil.Process()
    with pytest.raises(UserError) as caught:
        ChatTemplate(BOMBS[name]).render(CHAT)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert parent.memory_info().rss < 2**31
    gc.collect()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LOOPS + ENDS, "takes more than 5 seconds"),
        (BOMBS["a macro that calls itself"], "nested without end"),
        (BOMBS["a longer text"], "needs more than 1,024 MiB"),
        (BOMBS["a text that is written again"], "writes more than 16,000,000 characters"),
        ("{% for %}", "is broken (Expected an expression"),
        ("{% if %}{{ x", "is broken"),
        (BOMBS["nested loops"], "is broken (too many statically nested blocks"),
    ],
)
def test_what_is_said(text: str, said: str) -> None:
    with pytest.raises(Unrenderable) as caught:
        ChatTemplate(text).render(CHAT)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{{ 1 + 'a' }}", "{{ 1 / 0 }}", "{{ messages[9].x.y }}", "{{ raise_exception('no') }}"]
)
def test_a_refusal_is_of_this_conversation_only(text: str) -> None:
    template = ChatTemplate("{% if messages | length > 1 %}" + text + "{% endif %}ok")
    with pytest.raises(UserError, match="cannot render this conversation") as caught:
        template.render({"messages": CHAT["messages"] * 2})
    assert not isinstance(caught.value, Unrenderable)
    assert template.render(CHAT) == "ok"


def test_what_a_template_says_cannot_control_a_terminal() -> None:
    with pytest.raises(UserError) as caught:
        ChatTemplate("{{ raise_exception('\x1b[31mred\x1b]0;t\x07 \u202e x\\n y') }}").render(CHAT)
    assert str(caught.value).isprintable()


def test_every_character_comes_back() -> None:
    text = "".join(map(chr, [*range(0x300), *range(0xD800, 0xD810), *range(0x1F600, 0x1F610)]))
    assert ChatTemplate("{{ messages }}").render({"messages": text}) == text
    long = "é" * 15_000_000
    assert ChatTemplate("{{ messages }}").render({"messages": long}) == long


def test_what_is_not_plain_data() -> None:
    deep: list[Any] = []
    deep.append(deep)
    for value in (object(), deep, {1j: 2}, b"x"):
        with pytest.raises(UserError, match="not plain data"):
            ChatTemplate(HELLO).render({"messages": value})


# ---------------------------------------------------------------- one process, reused


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children()}


def test_one_process_for_all_renders_of_a_text(tmp_path: Path) -> None:
    before = children()
    one, two = chat_template(HELLO), chat_template(HELLO)
    assert one is two
    for count in range(50):
        assert one.render({"messages": [{"role": "user", "content": str(count)}]}) == f"<user>{count}"
    [worker] = children() - before
    other = chat_template(HELLO + "!")
    assert other.render(CHAT).endswith("!")
    assert len(children() - before) == 2
    del one, two, other
    gc.collect()
    assert children() <= before
    assert not psutil.pid_exists(worker)


def test_a_process_that_is_gone_is_replaced() -> None:
    before = children()
    template = ChatTemplate(HELLO)
    text = template.render(CHAT)
    [worker] = children() - before
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(UserError, match="SIGKILL"):
        template.render(CHAT)
    assert template.render(CHAT) == text


def test_a_process_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that swaps: the same conversation is rendered by a fresh one."""
    before = children()
    template = ChatTemplate(HELLO)
    text = template.render(CHAT)
    [worker] = children() - before
    os.kill(worker, signal.SIGSTOP)
    monkeypatch.setattr(module, "_PATIENCE", 5.0)
    assert template.render(CHAT) == text
    assert not psutil.pid_exists(worker)


def test_threads_share_a_process() -> None:
    template = ChatTemplate(HELLO)
    said: dict[int, list[str]] = {number: [] for number in range(4)}

    def ask(number: int) -> None:
        for _ in range(50):
            said[number].append(template.render({"messages": [{"role": "user", "content": str(number)}]}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {number: [f"<user>{number}"] * 50 for number in said}


def test_a_fork_has_a_process_of_its_own() -> None:
    template = ChatTemplate(HELLO)
    text = template.render(CHAT)
    child = os.fork()
    if child == 0:
        os._exit(0 if template.render(CHAT) == text else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert template.render(CHAT) == text


def test_an_interrupted_answer_does_not_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(HELLO)
    text = template.render(CHAT)
    reading = module.read

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        template.render({"messages": [{"role": "user", "content": "lost"}]})
    monkeypatch.setattr(module, "read", reading)
    assert template.render(CHAT) == text
