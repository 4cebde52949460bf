"""`farthing export` and `farthing inspect` from a shell: results on stdout, mistakes in one line with exit code 2."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from farthing.base.files import write_json
from farthing.cli import app, main
from farthing.weights import save_decoder
from farthing.weights.folder import read_config
from farthing.weights.fp8 import QUANTIZATION_CONFIG, SCALE, quantise


@pytest.fixture
def folder(
    tmp_path: Path, tiny_model: Path, small_deepseek: Callable[..., tuple[object, dict[str, object]]]
) -> Path:
    decoder, hf = small_deepseek()
    return save_decoder(decoder, hf, tmp_path / "deep", tokenizer_from=tiny_model)  # type: ignore[arg-type]


@pytest.fixture
def failed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command that must fail, and gives the one line it says."""

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["farthing", *map(str, words)])
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as done:
            main()
        said = capsys.readouterr()
        assert (done.value.code, said.out) == (2, "")
        assert said.err.count("\n") == 1
        return said.err

    return run


def test_inspect_prints_one_object_or_a_page(folder: Path) -> None:
    done = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["family"] == "deepseek_v3"
    assert {"parameters", "cache", "flops_per_token", "memory_bytes", "traps", "not_visible"} <= found.keys()
    page = CliRunner().invoke(app, ["inspect", str(folder)]).stdout
    assert page.startswith("model          deepseek_v3, 3 layers")


@pytest.mark.parametrize(
    ("to", "name"), [("gguf", "deep-bf16.gguf"), ("hf-fp8", "deep-fp8"), ("hf-bf16", "deep-bf16")]
)
def test_export_names_what_it_wrote(
    to: str, name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["export", str(folder), "--to", to, "--type", "bf16", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["path"], found["format"]) == (name, to)
    assert found["bytes"] > 100_000
    assert (tmp_path / name).exists()
    given = CliRunner().invoke(app, ["export", str(folder), "--to", to, "--out", f"other-{name}"])
    assert given.stdout == f"other-{name}\n"
    assert bool(found["notes"]) == (to != "hf-bf16"), "left out, or refused by vLLM"


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, failed: Callable[..., str]) -> None:
    assert "--to onnx" in failed("export", folder, "--to", "onnx")
    config = read_config(folder)
    write_json(folder / "config.json", config | {"n_group": 8, "topk_group": 4})
    assert "n_group" in failed("inspect", folder)
    write_json(folder / "config.json", config | {"n_group": 3})
    assert "must divide" in failed("export", folder, "--to", "gguf", "--out", tmp_path / "m.gguf")
    write_json(folder / "config.json", config | {"model_type": "mamba"})
    assert "'mamba'" in failed("inspect", folder)
    write_json(folder / "config.json", config)

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored, _ = quantise(tensors[name])
    save_file(tensors | {name: stored, name + SCALE: torch.ones(2, 2)}, folder / "model.safetensors")
    write_json(folder / "config.json", config | {"quantization_config": QUANTIZATION_CONFIG})
    message = failed("export", folder, "--to", "hf-bf16", "--out", tmp_path / "out")
    assert f"{name}{SCALE} has the shape (2, 2)" in message
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-9])
    assert "cut short" in failed("export", folder, "--to", "hf-bf16", "--out", tmp_path / "out")
