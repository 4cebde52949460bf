"""Fetch a PyPI package as an archive with whichever installer is available; nothing of it is installed or run.

Environments that uv makes have no pip, and those of pip know nothing of uv. Both read their own settings, so a mirror
configured for either is used here too.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from farthing.base.errors import UserError

_PIP = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest"]
_UV = ["pip", "install", "--no-deps", "--only-binary=:all:", "--quiet", "--no-cache", "--target"]


def fetch(text: str, name: str, folder: Path) -> None:
    """Put package `name` into `folder`: pip leaves its wheel there, uv what the wheel holds.

    Raises UserError when there is no installer, and when the one there is fails.
    """
    remedy = f"pip install --no-deps {name}"
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, *_PIP, str(folder), name]
    elif uv := shutil.which("uv"):
        remedy = f"uv {remedy}"
        command = [uv, *_UV, str(folder), "--python", sys.executable, name]
    elif python := _python_with_pip(folder.parent / f"{folder.name}.venv"):
        command = [python, *_PIP, str(folder), name]
    else:
        raise UserError(
            f"{text} cannot be fetched: there is neither pip nor uv here; install one of them, or give the path of "
            "a .gguf"
        )
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder.parent / f"{folder.name}.venv", ignore_errors=True)
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2].strip()
        raise UserError(
            f"{text} could not be downloaded ({why or 'no reason was given'}); install it with `{remedy}`"
        )


def _python_with_pip(folder: Path) -> str | None:
    """The Python of a new environment with pip; None if this Python was installed without ensurepip."""
    done = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, check=False)
    return str(folder / "bin" / "python") if done.returncode == 0 else None
