"""Keys: who they are, and what is left to them."""

from pathlib import Path

import pytest

from farthing.base.errors import UserError
from farthing.serve.errors import ApiError
from farthing.serve.keys import Caller, Keys, Limits, read_keys, single


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_without_keys_everyone_may_ask() -> None:
    assert not Keys().demanded
    caller = Keys().caller(None)
    assert caller is not None
    caller.admit()


def test_one_key() -> None:
    keys = single("correct horse")
    assert keys.demanded
    assert keys.caller("correct horse") is not None
    for wrong in (None, "", "correct hors", "correct horse ", "é" * 9):
        assert keys.caller(wrong) is None


@pytest.mark.parametrize("key", ["short", "", "with\nnewline", "schlüssel-lang"])
def test_a_key_that_is_none(key: str) -> None:
    with pytest.raises(UserError, match="--api-key"):
        single(key)


def test_requests_a_minute() -> None:
    clock = Clock()
    caller = Caller("a", limits=Limits(requests_per_minute=2), clock=clock)
    caller.admit()
    caller.admit()
    clock.now += 29  # nearly half a minute gives nearly one of two
    with pytest.raises(ApiError) as refused:
        caller.admit()
    assert refused.value.status == 429
    assert refused.value.code == "rate_limit_exceeded"
    assert 0 < float(refused.value.headers["Retry-After"]) <= 30
    clock.now += 2
    caller.admit()


def test_tokens_a_minute_may_be_overdrawn_once_and_are_paid_back() -> None:
    clock = Clock()
    caller = Caller("a", limits=Limits(tokens_per_minute=100), clock=clock)
    caller.admit()
    caller.spend(tokens=250, usd=1.0)
    clock.now += 60
    with pytest.raises(ApiError, match="tokens a minute"):
        caller.admit()
    clock.now += 31
    caller.admit()


def test_dollars_a_day() -> None:
    clock = Clock()
    caller = Caller("a", limits=Limits(usd_per_day=1.0), clock=clock)
    caller.spend(tokens=1, usd=1.5)
    with pytest.raises(ApiError, match="dollars a day"):
        caller.admit()
    clock.now += 43_300
    caller.admit()


def test_a_file_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(
        "- {name: alice, key: sk-alice-1, requests_per_minute: 1}\n"
        "- {name: bob, sha256: b3aa50f6ac7b1f9dcd1f4ab55a1d3b7dd9d5d2f7a5c1d9a4b6e8f2a4c6e8f0a2}\n"
    )
    keys = read_keys(path)
    alice = keys.caller("sk-alice-1")
    assert alice is not None
    assert alice.name == "alice"
    assert keys.caller("bob") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "must be a list"),
        ("[]", "must be a list"),
        ("- {name: a}", "either key or sha256"),
        ("- {name: a, key: sk-12345678, sha256: 0}", "key 1"),
        ("- {name: a, key: sk-12345678}\n- {name: a, key: sk-other-key}", "twice"),
        ("- {name: a, key: sk-12345678}\n- {name: b, key: sk-12345678}", "twice"),
        ("- {name: a, key: sk-12345678, requests_per_minute: 0}", "requests_per_minute"),
        ("- {name: a, key: sk-12345678, quota: 3}", "quota"),
        ("- {name: a, key: sk-1234567é}", "key 1: key: must be printable ASCII"),
        ("- {name: a, key: ' sk-12345678'}", "key 1: key: must be printable ASCII"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read_keys(path)
