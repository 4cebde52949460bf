"""`farthing watch` by the command line, on a run in another process."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml


def farthing(*words: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "farthing", *words], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_run_in_another_process_is_followed_to_its_end(
    tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_recipe(held_out=4, steps=12)))
    run = farthing("run", "tiny.yaml", "--quiet", cwd=tmp_path)
    until = time.monotonic() + 600
    while not (tmp_path / "runs" / "tiny" / "run.json").exists():
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    out, err = farthing("watch", "tiny", cwd=tmp_path).communicate(timeout=600)
    assert run.wait(600) == 0
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("tiny is running")
    assert any(line.startswith("step 12/12") for line in lines)
    assert lines[-1].startswith("tiny finished at")
    once = farthing("watch", "--json", cwd=tmp_path)  # the newest
    found = json.loads(once.communicate(timeout=600)[0])
    assert once.returncode == 0
    assert (found["state"], found["step"], found["steps"]) == ("finished", 12, 12)


def test_a_missing_run_is_one_line(tmp_path: Path) -> None:
    for words in (("nobody",), (), (".",)):
        process = farthing("watch", *words, cwd=tmp_path)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 2
        assert out == ""
        assert err.startswith("farthing: ")
        assert len(err.splitlines()) == 1
