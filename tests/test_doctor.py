"""`farthing doctor` works where things are missing or broken, and says nothing that is secret."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing import doctor
from farthing.cli import app
from farthing.cli.doctor import _lines
from farthing.cost import devices
from farthing.plans import measured
from farthing.plans.calibrate import instructions
from farthing.plans.measured import Calibration, Pace

PACE = Pace(1e-3, 1e-12, 1e-3, 1e-12)


@dataclasses.dataclass
class Status:
    name: str
    on: bool
    why: str


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Measuring takes next to nothing, the cache is empty, and the fast paths are two."""
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "cache"))
    for name in ("CHOSEN", "OTHER", "COPIED"):
        monkeypatch.setattr(doctor, name, 0.001)
    paths = [Status("packed weights", True, "oneDNN lays them out"), Status("graphs", False, "needs a GPU")]
    stub = types.SimpleNamespace(status=lambda device, dtype: paths)
    monkeypatch.setitem(sys.modules, "farthing.model.kernels", stub)


def shell(*words: str, **changed: str) -> "subprocess.CompletedProcess[str]":
    """`farthing doctor` in a process of its own; a variable that is changed to nothing is not set."""
    environment = {key: value for key, value in (os.environ | changed).items() if value}
    return subprocess.run(
        [sys.executable, "-m", "farthing", "doctor", *words], capture_output=True, text=True, env=environment
    )


# ---- what it says ----


def test_it_says_what_this_machine_is():
    found = doctor.examine(offline=True)
    assert found["machine"]["cores"] == devices.cpu_cores()
    assert found["machine"]["instructions_used"] in found["machine"]["instructions"]
    assert found["machine"]["memory_bytes"] > found["machine"]["free_memory_bytes"] > 0
    assert found["torch"]["threads"] >= 1
    assert found["chosen"]["dtype"] in ("bfloat16", "float32")
    assert all(found["measured"][key] > 0 for key in ("float32_flops", "bfloat16_flops", "bytes_per_second"))
    assert [path["on"] for path in found["fast_paths"]] == [True, False]
    assert found["hub"] == {"reachable": None, "why": "skipped: --offline"}
    assert found["calibrations"] == []
    text = "\n".join(_lines(found))
    assert "graphs          off: needs a GPU" in text
    assert "farthing calibrate measures this machine" in text


def test_json_is_one_object_and_nothing_else():
    done = CliRunner().invoke(app, ["doctor", "--offline", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["machine"]
    assert done.stdout.count("\n") == 1


def test_a_calibration_is_shown_with_its_date_and_whether_it_holds():
    known = Calibration(
        date="2026-11-23", device=devices.detect("cpu").name, dtype="float32", instructions=instructions(),
        threads=2, torch="2.13.0", took=8.0, timed=576, gemm_float32=1e11, gemm_bfloat16=3e11, bandwidth=1e10,
        disk=4e8, small_op=1e-6, decode=PACE, prefill=PACE, train=PACE, optimizer=1e-9,
    )  # fmt: skip
    measured.save(known)
    measured.save(dataclasses.replace(known, dtype="bfloat16", device="cpu: another"))
    found = doctor.examine(offline=True)["calibrations"]
    assert [(each["dtype"], each["date"], each["holds"]) for each in found] == [
        ("float32", "2026-11-23", True),
        ("bfloat16", "2026-11-23", False),
    ]


# ---- a broken machine ----


def raises(*_: object, **__: object) -> None:
    raise RuntimeError("broken")


def test_what_cannot_be_found_out_is_unknown(monkeypatch):
    import psutil
    import torch

    monkeypatch.setattr(devices, "cpu_model", raises)
    monkeypatch.setattr(devices, "cpu_cores", raises)
    monkeypatch.setattr(psutil, "virtual_memory", raises)
    monkeypatch.setattr(torch.__config__, "show", raises)
    monkeypatch.setattr(torch.cuda, "is_available", raises)
    monkeypatch.setattr(doctor, "choose", raises)
    monkeypatch.setattr(doctor.shutil, "disk_usage", raises)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", raises)
    monkeypatch.setattr(doctor.importlib.metadata, "version", raises)
    monkeypatch.setattr(doctor.calibration, "products", raises)
    monkeypatch.setitem(sys.modules, "farthing.model.kernels", None)
    monkeypatch.setattr(doctor, "_hub_cache", raises)
    found = doctor.examine(offline=True)
    json.dumps(found, allow_nan=False)
    assert found["torch"] is None
    assert found["chosen"] is None
    assert found["machine"]["processor"] is None
    text = "\n".join(_lines(found))
    assert "cannot be loaded" in text
    assert "None" not in text


def test_a_machine_without_torch_and_without_a_readable_proc(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: raises_permission())
    found = doctor.examine(offline=True)
    assert found["torch"] is None
    assert found["machine"]["instructions"]
    assert "cannot be loaded" in "\n".join(_lines(found))


def raises_permission() -> str:
    raise PermissionError(13, "Permission denied")


def test_a_cache_that_cannot_be_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "file" / "below"))
    [_, cache] = doctor.examine(offline=True)["disks"]
    assert cache["writable"] is False
    assert "NOT writable" in "\n".join(_lines(doctor.examine(offline=True)))


def test_a_folder_that_is_gone_ends_nothing(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    [runs, _] = doctor.examine(offline=True)["disks"]
    assert runs == {"what": "runs", "path": None, "free_bytes": None, "writable": None}


@pytest.mark.parametrize(("name", "value"), [("FARTHING_ISA", "avx9"), ("FARTHING_KERNELS", "fast")])
def test_a_setting_that_makes_no_sense_is_one_line(name, value):
    done = shell("--offline", **{name: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert f"{name}={value}" in done.stderr


# ---- GPUs, extras, caches, the hub ----


def test_a_gpu_that_torch_cannot_use_is_shown(monkeypatch):
    said = "NVIDIA H100 80GB HBM3, 81559, 9.0, 570.86.15\nTesla T4, 15360, 7.5, 570.86.15\n"
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=said))
    found = doctor._gpus()
    assert [gpu["compute_capability"] for gpu in found] == ["9.0", "7.5"]
    assert found[0]["memory_bytes"] == 81559 << 20
    text = "\n".join(_lines(doctor.examine(offline=True)))
    assert "NVIDIA H100 80GB HBM3, 85.5 GB, compute capability 9.0, driver 570.86.15" in text


@pytest.mark.parametrize("said", ["", "NVIDIA-SMI has failed", "a, b, c, d\n"])
def test_a_driver_that_says_something_else_is_not_believed(monkeypatch, said):
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout=said))
    assert doctor._gpus() == doctor._gpus_of_torch()


def test_extras_are_read_from_the_package(monkeypatch):
    extras = types.SimpleNamespace(get_all=lambda _: ["gym", "all", "none"])
    needs = [
        "pytest>=1", "no-such-thing>=2; extra == 'gym'", "pytest>=8; extra == 'none'",
        "farthing[gym]; extra == 'all'", "typer; python_version < '3' and extra == 'none'",
    ]  # fmt: skip
    monkeypatch.setattr(doctor.importlib.metadata, "metadata", lambda _: extras)
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: needs)
    install = "pip install 'farthing[{}]'"
    assert doctor.optional() == [
        {
            "name": "all",
            "installed": False,
            "missing": ["no-such-thing>=2"],
            "install": install.format("all"),
        },
        {
            "name": "gym",
            "installed": False,
            "missing": ["no-such-thing>=2"],
            "install": install.format("gym"),
        },
        {"name": "none", "installed": True, "missing": [], "install": install.format("none")},
    ]


def test_a_cache_is_counted_once_and_not_for_long(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"x" * 1000)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "file")
    size, whole = doctor._size(tmp_path)
    assert 1000 <= size < 1500
    assert whole
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(doctor.time, "monotonic", lambda: next(clock))
    assert doctor._size(tmp_path)[1] is False


@pytest.fixture
def session(monkeypatch):
    """A function that sets how the hub answers a HEAD request."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def answers(head: object) -> None:
        monkeypatch.setattr(huggingface_hub, "get_session", lambda: types.SimpleNamespace(head=head))

    return answers


def test_a_hub_that_answers_is_reachable(session):
    session(lambda address, timeout: types.SimpleNamespace(status_code=200))
    assert doctor._Hub(offline=False).answer() == {"reachable": True, "why": "answers 200"}


def test_what_an_error_says_is_not_shown(session):
    def head(address: str, timeout: float) -> None:
        raise OSError("proxy http://me:secret@proxy")

    session(head)
    assert doctor._Hub(offline=False).answer() == {"reachable": False, "why": "OSError"}


def test_a_hub_that_says_nothing_is_not_waited_for(session, monkeypatch):
    monkeypatch.setattr(doctor, "HUB_SECONDS", -0.5)  # so that no time is left for an answer
    session(lambda address, timeout: time.sleep(0.5) or types.SimpleNamespace(status_code=200))
    assert doctor._Hub(offline=False).answer()["reachable"] is False


def test_offline_asks_nobody(session, monkeypatch):
    from huggingface_hub import constants

    session(raises)
    assert doctor._Hub(offline=True).answer()["reachable"] is None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor._Hub(offline=False).answer() == {
        "reachable": None,
        "why": "skipped: HF_HUB_OFFLINE is set",
    }


# ---- nothing secret ----


def test_nothing_in_it_is_secret(tmp_path):
    home = tmp_path / "marguerite-du"
    (home / ".cache" / "farthing").mkdir(parents=True)
    (home / "runs").mkdir()
    secrets = {
        "HF_TOKEN": "hf_tokenthatnobodymaysee",
        "HTTPS_PROXY": "http://marguerite:swordfish@127.0.0.1:9",  # nobody listens there
        "FARTHING_SOMETHING": "sesame",
        "HF_ENDPOINT": "https://marguerite:swordfish@127.0.0.1:9",
        "USER": "marguerite",
        "LOGNAME": "marguerite",
    }
    done = [
        shell(*words, **secrets, HOME=str(home), FARTHING_CACHE="", HF_HUB_OFFLINE="", HF_HOME="")
        for words in ((), ("--json",))
    ]
    said = "".join(each.stdout + each.stderr for each in done)
    assert [each.returncode for each in done] == [0, 0], said
    found = json.loads(done[1].stdout)
    assert found["hub"]["reachable"] is False
    assert found["settings"] == {"FARTHING_SOMETHING": "set"}
    assert found["caches"][0]["path"] == "~/.cache/farthing"
    for secret in ("tokenthatnobody", "marguerite", "swordfish", "sesame", "127.0.0.1", str(tmp_path)):
        assert secret not in said, secret
    host = socket.gethostname()
    assert len(host) < 4 or host == "localhost" or host not in said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("HOME/x", "~/x"),
        ("HOME", "~"),
        ("no compiler in HOME/bin: off", "no compiler in ~/bin: off"),
        ("HOMELY/x", "HOMELY/x"),
        ("/data/ann/x", "/data/USER/x"),
        ("/data/anna/x", "/data/anna/x"),
        ("at http://ann:word@proxy:1/x", "at http://proxy:1/x"),
    ],
)
def test_a_text_is_cleaned(text, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.Path, "home", lambda: Path("/data/homes/ann"))
    monkeypatch.setattr(doctor.getpass, "getuser", lambda: "ann")
    home = "/data/homes/ann"
    assert doctor._clean({"a": [text.replace("HOME", home)]}) == {
        "a": [shown.replace("HOMELY", home + "LY").replace("HOME", home)]
    }
