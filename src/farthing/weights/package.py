"""Fetch a PyPI package as an archive with whichever installer is available; nothing of it is installed or run.

Environments that uv makes have no pip, and those of pip know nothing of uv. Both read their own settings, so a mirror
configured for either is used here too.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.waiting import Transfer

_PIP = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--progress-bar", "off", "--dest"]
_UV = ["pip", "install", "--no-deps", "--only-binary=:all:", "--quiet", "--no-cache", "--target"]
# In what pip and uv say, in lower case. What could not be reached is also said not to exist, so it is looked for first.
_UNREACHABLE = (
    "connection", "timed out", "timeout", "name resolution", "dns error", "failed to fetch", "request failed",
    "max retries", "proxy", "offline", "no network",
)  # fmt: skip
_SIZE = re.compile(
    r"^\s*Downloading .*\(([0-9.]+) (bytes|kB|MB|GB)\)", re.MULTILINE
)  # what pip says of a file
_UNITS = {"bytes": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
_UNKNOWN = ("no matching distribution", "not found in the package registry", "no versions of", "404")


def fetch(text: str, name: str, folder: Path) -> None:
    """Put package `name` into `folder`: pip leaves its wheel there, uv what the wheel holds.

    Raises UserError when there is no installer, and when the one there is fails.
    """
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, *_PIP, str(folder), name]
    elif uv := shutil.which("uv"):
        command = [uv, *_UV, str(folder), "--python", sys.executable, name]
    elif python := _python_with_pip(folder.parent / f"{folder.name}.venv"):
        command = [python, *_PIP, str(folder), name]
    else:
        raise UserError(
            f"{text} cannot be fetched: there is neither pip nor uv here; install one of them, or give the path of "
            "a .gguf"
        )
    try:
        done = _run(command, text, folder)
    finally:
        shutil.rmtree(folder.parent / f"{folder.name}.venv", ignore_errors=True)
    if done.returncode:
        raise UserError(f"{text} could not be downloaded: {_reason(done.stderr)}")


def _run(command: list[str], text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an installer, and say how far it is: neither tells where its output is no terminal, so its files do."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name, (Path(name) / "said").open("w+") as said:
        scratch = Path(name)

        def measure() -> tuple[int, int]:
            there = sum(_size(path) for path in (*scratch.rglob("*"), *folder.rglob("*")))
            sizes = _SIZE.findall((scratch / "said").read_text(errors="replace"))
            return there, int(float(sizes[-1][0]) * _UNITS[sizes[-1][1]]) if sizes else 0

        with Transfer(f"downloading {text}", measure):
            return subprocess.run(
                command,
                stdout=said,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=os.environ | {"TMPDIR": name},
            )


def _size(path: Path) -> int:
    """Bytes of a file, 0 if it is none or has gone."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _reason(said: str) -> str:
    """What an installer's complaint comes to, and what to do about it. Its last line often hides the reason: pip ends
    with "no matching distribution" also when it reached no index, or with a notice of its own new version."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if any(sign in said.lower() for sign in _UNREACHABLE):
        return "the package index cannot be reached; connect and run the same command again, or give a .gguf"
    if any(sign in said.lower() for sign in _UNKNOWN):
        return (
            "the package index has no wheel of that name for this Python; check the spelling, or give a .gguf"
        )
    errors = [line for line in lines if line.lower().startswith("error")] or lines
    why = errors[-1].partition(":")[2].strip() or errors[-1] if errors else "the installer gave no reason"
    return f"{why}; run the same command again, or give the path of a .gguf"


def _python_with_pip(folder: Path) -> str | None:
    """The Python of a new environment with pip; None if this Python was installed without ensurepip."""
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, check=False)
    return str(folder / "bin" / "python") if done.returncode == 0 else None
