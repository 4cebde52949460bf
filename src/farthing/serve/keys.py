"""Who may ask, and how much: API keys, and limits on each.

Keys are kept as SHA-256 digests and compared in constant time. A file of keys is YAML:

    - name: alice
      key: sk-...              # or sha256: the digest of one
      requests_per_minute: 60  # each limit is optional
      tokens_per_minute: 20000
      usd_per_day: 1.5
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from farthing.base.errors import UserError
from farthing.base.schema import Strict, checked, read_yaml
from farthing.serve.errors import ApiError

DAY, MINUTE = 86_400.0, 60.0

Positive = Annotated[float, Field(gt=0)]


class Limits(Strict):
    """What one key may use; None is unlimited."""

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None  # prompt and answer
    usd_per_day: Positive | None = None


class _Entry(Limits):
    name: Annotated[str, Field(min_length=1, max_length=100)]
    key: Annotated[str, Field(min_length=8)] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class _Bucket:
    """A bucket that fills in `seconds`; whoever finds `least` in it may take, and may overdraw it."""

    def __init__(self, size: float, seconds: float, now: float, least: float = 0.0) -> None:
        self.size, self.rate, self.least = size, size / seconds, min(least, size)
        self.level, self.at = size, now

    def wait(self, now: float) -> float:
        """Seconds until something may be taken again; 0 if it may now."""
        self.level = min(self.size, self.level + (now - self.at) * self.rate)
        self.at = now
        enough = self.level > 0 and self.level >= self.least
        return 0.0 if enough else (self.least - self.level) / self.rate + 1e-3

    def take(self, amount: float) -> None:
        self.level -= amount


class Caller:
    """One key's holder, and what is left to them."""

    def __init__(
        self,
        name: str,
        digest: bytes = b"",
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.digest, self._clock = name, digest, clock
        limits, now = limits or Limits(), clock()
        self._buckets = {
            what: _Bucket(size, seconds, now, least)
            for what, size, seconds, least in (
                ("requests", limits.requests_per_minute, MINUTE, 1.0),
                ("tokens", limits.tokens_per_minute, MINUTE, 0.0),
                ("dollars", limits.usd_per_day, DAY, 0.0),
            )
            if size is not None
        }

    def admit(self) -> None:
        """Count a request.

        Raises:
            ApiError: 429 if a limit is used up, with the seconds after which to ask again.
        """
        now = self._clock()
        for what, bucket in self._buckets.items():
            if (wait := bucket.wait(now)) > 0:
                per = "day" if what == "dollars" else "minute"
                raise ApiError(
                    f"the limit on {what} a {per} of key {self.name!r} is used up; ask again in {wait:.0f} s",
                    status=429,
                    kind="rate_limit_error",
                    code="rate_limit_exceeded",
                    retry_after=wait,
                )
        if "requests" in self._buckets:
            self._buckets["requests"].take(1)

    def spend(self, tokens: int, usd: float) -> None:
        """Count what a request used."""
        for what, amount in (("tokens", tokens), ("dollars", usd)):
            if what in self._buckets:
                self._buckets[what].take(amount)


class Keys:
    """All callers; without any, everyone is `anonymous`."""

    def __init__(self, callers: Sequence[Caller] = ()) -> None:
        self._callers = list(callers)
        self._anyone = Caller("anonymous")

    @property
    def demanded(self) -> bool:
        """Whether a key is needed."""
        return bool(self._callers)

    def caller(self, presented: str | None) -> Caller | None:
        """The holder of a key; None if there is no such key. Takes as long for a wrong key as for a right one."""
        if not self._callers:
            return self._anyone
        digest, found = _digest(presented or ""), None
        for caller in self._callers:
            if hmac.compare_digest(digest, caller.digest):
                found = caller
        return found


def single(key: str) -> Keys:
    """One key without limits. Raises UserError for one that is too short to be a secret."""
    if len(key) < 8 or not _fit_for_headers(key):
        raise UserError("--api-key: needs at least 8 printable ASCII characters")
    return Keys([Caller("api-key", _digest(key))])


def read_keys(path: Path) -> Keys:
    """The keys of a file. Raises UserError that names what is wrong in it."""
    found = read_yaml(path)
    if not isinstance(found, list) or not found:
        raise UserError(f"{path}: must be a list of keys, each with a name and a key")
    callers: list[Caller] = []
    for number, given in enumerate(found, 1):
        entry = checked(_Entry, given, f"{path}: key {number}")
        if (entry.key is None) == (entry.sha256 is None):
            raise UserError(f"{path}: key {number}: give either key or sha256")
        if entry.key is not None and not _fit_for_headers(entry.key):
            raise UserError(f"{path}: key {number}: key: must be printable ASCII characters")
        digest = _digest(entry.key) if entry.key is not None else bytes.fromhex(entry.sha256 or "")
        if any(caller.name == entry.name or caller.digest == digest for caller in callers):
            raise UserError(f"{path}: key {number}: its name or key stands there twice")
        callers.append(Caller(entry.name, digest, entry))
    return Keys(callers)


def _fit_for_headers(key: str) -> bool:
    return key.isprintable() and key.isascii() and key == key.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
