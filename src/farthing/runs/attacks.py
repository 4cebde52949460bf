"""What a run says of its reward audit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.recipe import Recipe
from farthing.runs.folder import rewards_used
from farthing.tasks import sandbox
from farthing.tasks.audit import paid


def verdict(found: dict[str, Any], path: Path) -> str:
    """The audit in a line. Raises UserError where a verifier of ours was cheated."""
    own = [case for case in found["cases"] if "own" in case]
    failed = [case["case"] for case in found["cases"] if not case["passed"] and "own" not in case]
    if failed:
        raise UserError(f"the reward audit failed on {', '.join(sorted(set(failed)))}; see {path}")
    fooled = sum(not case["passed"] for case in own)
    if fooled:
        return (
            f"reward audit: {len(found['cases'])} cases, {fooled} of which went wrong in rewards of your own"
        )
    return f"reward audit: {len(found['cases'])} cases, none of which earned a reward, ran code or hung"


def warnings(found: dict[str, Any], path: Path, recipe: Recipe) -> list[str]:
    """What rewards of the user's own pay for, and what does not hold programs here."""
    lines = [f"{line}; see {path}" for line in paid([case for case in found["cases"] if "own" in case])]
    if "code" in rewards_used(recipe) and sandbox.protection() == "limits":
        lines.append(sandbox.WEAK)
    return [f"warning: {line}" for line in lines]
