"""An installer that fails is asked why: its reason is said, and no name is recommended that does not exist."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.weights import package

NONE = "ERROR: Could not find a version that satisfies the requirement x (from versions: none)\n"
NONE += "ERROR: No matching distribution found for x\n"


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        (NONE, "no wheel of that name for this Python; check the spelling"),
        (NONE + "[notice] A new release of pip is available: 23.2 -> 26.1\n", "no wheel of that name"),
        ("error: x was not found in the package registry\n", "no wheel of that name"),
        ("WARNING: Retrying after connection broken by 'NewConnectionError'\n" + NONE, "cannot be reached; connect"),
        ("error: Failed to fetch: `https://x/`\n  Caused by: dns error\n", "cannot be reached; connect"),
        ("ERROR: Hash mismatch\n[notice] A new release of pip is available\n", "Hash mismatch; run the same command"),
        ("", "the installer gave no reason"),
    ],
)  # fmt: skip
def test_the_reason_is_said(stderr: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(UserError) as error:
        package.fetch("pypi:x", "x", tmp_path)
    assert said in str(error.value)
    assert "install" not in str(error.value).replace("installer", "")
    assert "\n" not in str(error.value)
