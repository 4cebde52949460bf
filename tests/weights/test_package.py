"""An installer that fails is asked why: its reason is said, and no name is recommended that does not exist."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from farthing.base.errors import UserError
from farthing.base.waiting import Transfer
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


def test_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip says how large a file is, and lets it grow in a temporary folder."""
    seen: list[tuple[int, int]] = []
    lines: list[str] = []

    class Watched(Transfer):
        def __init__(self, what: str, measure: Callable[[], tuple[int, int]]) -> None:
            super().__init__(what, measure)
            self.measure = measure

        def __exit__(self, *exception: object) -> None:
            seen.append(self.measure())
            lines.append(self.line(10.0))
            super().__exit__(*exception)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        options["stdout"].write("Collecting x\n  Downloading x-1-py3-none-any.whl (93.4 MB)\n")
        options["stdout"].flush()
        part = Path(options["env"]["TMPDIR"]) / "pip-unpack-1" / "x.whl"
        part.parent.mkdir()
        part.write_bytes(b"x" * 20_000_000)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(package, "Transfer", Watched)
    monkeypatch.setattr(subprocess, "run", run)
    (tmp_path / "into").mkdir()
    package.fetch("pypi:x", "x", tmp_path / "into")
    [(done, total)] = seen
    assert (round(done, -3), total) == (20_000_000, 93_400_000)
    assert lines == ["downloading pypi:x ████░░░░░░░░░░░░░░░░ 20 MB of 93.4 MB, 37 s left"]
    assert [path.name for path in tmp_path.iterdir()] == ["into"]
