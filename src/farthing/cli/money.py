"""Money: what a plan costs, what a run has cost, and whether a claim can be true."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COMMANDS: tuple[Callable[..., Any], ...] = ()
