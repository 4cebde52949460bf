"""The short answer, the page and the template."""

import re

import pytest

from farthing.base.errors import UserError
from farthing.base.schema import parse_text
from farthing.claims.answer import answer, millions
from farthing.claims.check import check
from farthing.claims.claim import builtin, load, parse
from farthing.claims.page import page
from farthing.claims.template import TEMPLATE
from farthing.claims.text import short, text

SOURCES = [{"text": "a test", "date": "2026", "evidence": "read"}]


def claim(reported, **more):
    of = [name for name in (*reported, *more) if name not in ("our_price_per_device_hour", "excluded")]
    sources = [{**SOURCES[0], "of": of}]
    return parse(
        {"name": "mine", "title": "Mine", "about": "Mine.", "reported": reported, "sources": sources, **more},
        "mine",
    )


def said(found) -> dict[str, str]:
    return dict(answer(check(found)).lines)


@pytest.mark.parametrize("name", builtin())
def test_a_newspaper_could_print_it(name):
    finding = check(load(name))
    lines = short(finding, 80).splitlines()
    assert len(lines) <= 12
    assert all(len(line) <= 80 for line in lines)
    for question, reply in answer(finding).lines[1:]:
        assert reply.startswith(("yes: ", "no: ", "cannot be known: ")), question
    assert text(finding, 80).startswith("\n".join(lines))
    assert "whole cost? implausible" not in text(finding)


def test_deepseek_v3_is_answered_as_people_ask():
    found = said(load("deepseek-v3"))
    assert found["claimed"].startswith("$5.576M, 2,788,000 hours of NVIDIA H800")
    assert found["do its figures agree with each other?"].startswith("yes")
    assert "39.1%" in found["could the hardware do it?"]
    assert found["is it the whole cost?"].startswith("no: at least $10.7M with what sources put a figure on")


def test_a_price_of_ours_is_marked_and_not_judged():
    hours = claim(
        {"device": "h100", "device_hours": 1000}, excluded=[{"what": "staff", "amount": [1e9, 1e9], **SOURCE}]
    )
    finding = check(hours)
    assert finding.price_is_ours
    assert finding.lines[2].verdict == "cannot be checked"
    assert "which is ours" in said(hours)["is it the whole cost?"]
    assert "a price of ours" in text(finding)


SOURCE = {"source": "a test", "date": "2026", "evidence": "read"}


def test_dollars_and_a_rent_of_ours_become_hours_and_are_not_judged():
    kimi = check(load("kimi-k2-thinking"))
    assert kimi.device_hours == pytest.approx(2.3e6)
    (work,) = kimi.compute
    assert work.mfu[0] == pytest.approx(0.389, abs=0.002)  # as the hours at $2 give it
    assert kimi.lines[1].verdict == "cannot be checked"
    assert "our assumption" in kimi.lines[1].text
    assert not [each for each in kimi.checks if each.about in ("price", "rent")]


def test_dollars_and_the_claims_own_rent_become_hours():
    found = check(
        claim({"device": "h100", "dollars": 3000, "price_per_device_hour": 3.0, "tokens": 1e9}, params=1e9)
    )
    assert found.device_hours == pytest.approx(1000)
    assert not [each for each in found.checks if each.about == "price"]  # it would agree with itself
    assert found.compute[0].mfu[0] == pytest.approx(6e18 / (1000 * 3600 * 989.4e12), rel=0.01)


def test_hours_and_a_model_bound_the_tokens():
    found = check(load("gpt-oss"))
    bound = 2.1e6 * 3600 * 989e12 / (6 * 5.1e9) / 1e12
    (given,) = re.findall(r"enough for ([\d.,]+)T at most", found.lines[1].text)
    assert float(given.replace(",", "")) == pytest.approx(bound, rel=0.01)


def test_the_page_is_whole_and_escapes_what_a_claim_says():
    finding = check(claim({"device": "h100", "device_hours": 10, "dollars": 20}))
    evil = finding.claim.model_copy(update={"title": "<script>alert(1)</script>", "about": 'a "b" & <i>'})
    made = page(check(evil))
    assert "<script" not in made
    assert "&lt;script&gt;" in made
    assert not re.search(r"(?:src|href)=|url\(|@import", made)
    assert answer(finding).judgement in page(finding)


def test_the_template_is_a_claim():
    finding = check(parse(parse_text(TEMPLATE, "template"), "template"))
    assert finding.verdict == "plausible"
    uncommented = re.sub(r"^(\s*)# (\w+:)", r"\1\2", TEMPLATE, flags=re.MULTILINE)
    keys = parse_text(uncommented, "template")["reported"]
    assert {"price_per_device_hour", "our_price_per_device_hour", "tokens_are", "seq_len"} <= set(keys)


@pytest.mark.parametrize(
    ("figures", "named"),
    [
        ({"dollars": "€5M"}, "dollars"),
        ({"dollars": "40 million yuan"}, "dollars"),
        ({"euros": 5e6}, "euros"),
        ({"dollars": 5, "currency": "EUR"}, "currency"),
    ],
)
def test_amounts_are_in_dollars(figures, named):
    with pytest.raises(UserError, match=rf"^[^\n]*{named}: amounts are in US dollars; convert [^\n]*$"):
        claim({"device": "h100", **figures})
    parts = [{"name": "a", "dollars": 5}, {"name": "b", **figures}]
    with pytest.raises(UserError, match="US dollars"):
        claim({"device": "h100"}, parts=parts)


def test_large_amounts_are_short():
    assert [millions(usd) for usd in (5.576e6, 1.6e9, 294_000, 50, 4.5)] == [
        "$5.576M",
        "$1.6B",
        "$294,000",
        "$50",
        "$4.50",
    ]
