"""Importing .gguf: against transformers' own reading of the same file, and every refusal."""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from farthing.base.errors import UserError
from farthing.weights import gguf_expand, gguf_read
from farthing.weights.folder import read_config, read_tensors

Write = Callable[..., Path]


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_real_file_becomes_an_ordinary_folder(smollm2: Path) -> None:
    config = read_config(smollm2)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 100_000.0}
    assert config["rope_theta"] == 100_000.0
    assert config["rope_scaling"] is None
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (9, 3, 64)
    assert config["max_position_embeddings"] == 8192
    assert config["tie_word_embeddings"]
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in read_tensors(smollm2)}
    assert len(tensors) == 272
    assert {dtype for _, dtype in tensors.values()} == {torch.bfloat16}
    assert tensors["model.embed_tokens.weight"][0] == (49152, 576)
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]
    assert "license: apache-2.0" in (smollm2 / "README.md").read_text()


def test_the_real_file_is_imported_in_seconds(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Seconds of processor time, which other work on the machine does not stretch as it does the clock's."""
    started = time.process_time()
    gguf_read.import_gguf(smollm2_gguf, tmp_path / "m")
    assert time.process_time() - started < 15
    assert len(dict(read_tensors(tmp_path / "m"))) == 272


def test_transformers_loads_it_and_it_answers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=16, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2, "the answer ends by itself, with <|im_end|>"


@pytest.mark.slow
def test_every_weight_is_transformers_own_rounded_once(smollm2: Path, smollm2_gguf: Path) -> None:
    pytest.importorskip("accelerate")  # transformers wants it to read a .gguf
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    state = theirs.state_dict()
    for name, tensor in read_tensors(smollm2):
        assert torch.equal(tensor, state[name].to(torch.bfloat16)), name
    ours = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p, q = (model(ids).logits.log_softmax(-1) for model in (theirs, ours))
    assert (p.exp() * (p - q)).sum(-1).max() < 0.01


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("head", [False, True], ids=["tied", "untied"])
def test_each_familys_tensors_come_out_as_they_went_in(
    arch: str, head: bool, write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    """The tensors come out as they went in, but for the rows of q and k, reordered for llama only."""
    from transformers import AutoModelForCausalLM

    tensors = tiny.tensors(bias=arch == "qwen2", norms=arch == "qwen3", head=head)
    path = write_gguf(arch, tensors=tensors)
    folder = gguf_read.import_gguf(path, tmp_path / "out")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(model).__name__ == gguf_read._CLASSES[arch]
    assert ("lm_head.weight" in dict(read_tensors(folder))) == head
    state = model.state_dict()
    for name, heads in (("q", 4), ("k", 2)):
        stored = torch.from_numpy(tensors[f"blk.1.attn_{name}.weight"]).bfloat16().float()
        read = state[f"model.layers.1.self_attn.{name}_proj.weight"]
        if arch == "llama":  # llama.cpp's converter, as its documentation has it
            read = read.reshape(heads, 2, 8, 64).swapaxes(1, 2).reshape(heads * 16, 64)
        assert torch.equal(read, stored)
    if arch == "qwen2":
        bias = torch.from_numpy(tensors["blk.0.attn_k.bias"]).bfloat16().float()
        assert torch.equal(state["model.layers.0.self_attn.k_proj.bias"], bias)
    ours = {name: torch.from_numpy(t).bfloat16() for name, t in tensors.items()}
    assert torch.equal(state["model.norm.weight"].bfloat16(), ours["output_norm.weight"])
    assert torch.equal(state["model.layers.0.mlp.down_proj.weight"].bfloat16(), ours["blk.0.ffn_down.weight"])


def test_halves_undoes_llama_cpps_order() -> None:
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    stored = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)
    assert not np.array_equal(stored, rows)
    assert np.array_equal(gguf_read.halves(stored, 2), rows)


def llama3_divisors(factor: float, theta: float, head_dim: int, original: int = 8192) -> np.ndarray:
    """Written out from Meta's code, one frequency at a time."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original / 1:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_stretching_is_recovered(
    factor: float, write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    divisors = llama3_divisors(factor, 500_000.0, 16)
    assert len(set(divisors)) > 2, "the ramp is in the test"
    keys = tiny.keys | {"rope.freq_base": 500_000.0}
    path = write_gguf(keys=keys, tensors=tiny.tensors() | {"rope_freqs.weight": divisors})
    folder = gguf_read.import_gguf(path, tmp_path / "out")
    config = AutoConfig.from_pretrained(folder)
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    legacy = read_config(folder)
    assert legacy["rope_theta"] == 500_000.0
    assert legacy["rope_scaling"]["rope_type"] == "llama3"


def test_stretching_of_another_kind_is_refused(
    write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    odd = np.linspace(1, 5, 8, dtype=np.float32)
    path = write_gguf(tensors=tiny.tensors() | {"rope_freqs.weight": odd})
    assert "rope_freqs.weight" in said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32, "yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
        ),
        ({"type": "none"}, {"rope_type": "default"}),
    ],
)
def test_named_stretchings(
    keys: dict[str, Any], expected: dict[str, Any], write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    path = write_gguf(keys=tiny.keys | {f"rope.scaling.{key}": value for key, value in keys.items()})
    config = read_config(gguf_read.import_gguf(path, tmp_path / "out"))
    assert config["rope_parameters"] == expected | {"rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rope.scaling.type": "longrope"}, "longrope"),
        ({"rope.scaling.type": "yarn"}, "yarn"),
        ({"expert_count": 8}, "llama.expert_count"),
        ({"attention.sliding_window": 64}, "attention.sliding_window"),
        ({"attention.scale": 0.5}, "attention.scale"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"attention.causal": False}, "attention.causal"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.value_length": 8}, "attention.value_length"),
        ({"attention.head_count": [4, 4]}, "attention.head_count"),
        ({"feed_forward_length": 32}, "the shape"),
        ({"block_count": 3}, "lacks the tensor blk.2."),
        ({"block_count": 1}, "holds a tensor blk.1."),
        ({"context_length": None}, "context_length"),
        ({"attention.head_count": 0}, "attention.head_count"),
        ({"attention.head_count": "nine"}, "attention.head_count"),
        ({"rope.freq_base": float("nan")}, "rope.freq_base"),
        ({"block_count": 2**31}, "layers"),
    ],
)
def test_metadata_that_cannot_be_carried_over(
    changed: dict[str, Any], named: str, write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    keys = {key: value for key, value in (tiny.keys | changed).items() if value is not None}
    path = write_gguf(keys=keys)
    message = said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))
    assert named in message
    assert str(path) in message
    assert list(tmp_path.iterdir()) == [path]


def test_neutral_metadata_is_accepted(write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path) -> None:
    path = write_gguf(keys=tiny.keys | {"expert_count": 0, "logit_scale": 1.0, "attention.causal": True})
    assert read_config(gguf_read.import_gguf(path, tmp_path / "out"))["model_type"] == "llama"


@pytest.mark.parametrize(
    "extra", ["blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "rope_factors_long.weight"]
)
def test_tensors_that_cannot_be_carried_over(
    extra: str, write_gguf: Write, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    path = write_gguf(tensors=tiny.tensors() | {extra: np.ones(64, dtype=np.float32)})
    assert extra in said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))


@pytest.mark.parametrize("arch", ["gemma3", "mamba"])
def test_other_architectures(arch: str, write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf(arch)
    assert arch in said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))


def test_no_such_file(tmp_path: Path) -> None:
    assert "does not exist" in said(lambda: gguf_read.import_gguf(tmp_path / "no.gguf", tmp_path / "out"))


def test_damaged_files(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf()
    whole = path.read_bytes()
    contents = [b"", b"GGUF", b"<html>404</html>" * 9, b"\0" * 64]
    contents += [whole[:length] for length in range(4, len(whole), len(whole) // 23)]
    contents += [whole[:8] + b"\xff" * 8 + whole[16:], whole[:16] + b"\xff" * 8 + whole[24:]]
    for content in contents:
        path.write_bytes(content)
        assert str(path) in said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == [path]


def test_a_part_of_a_split_file(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "llama-gguf-split" in said(lambda: gguf_read.import_gguf(tmp_path / "part.gguf", tmp_path / "out"))


def test_quantised_rows_are_expanded_in_pieces(
    write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf()
    whole = dict(read_tensors(gguf_read.import_gguf(path, tmp_path / "whole")))
    monkeypatch.setattr(gguf_expand, "_CHUNK", 64 * 7)
    pieces = dict(read_tensors(gguf_read.import_gguf(path, tmp_path / "pieces")))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert len(whole) == len(pieces) == 20


def test_a_killed_import_leaves_nothing_and_the_next_one_cleans_up(tmp_path: Path, write_gguf: Write) -> None:
    path = write_gguf()
    code = "import sys, time; from pathlib import Path; from farthing.weights import gguf_read as gguf; "
    code += "gguf.write_tensors = lambda *_: time.sleep(100); "
    code += "gguf.import_gguf(Path(sys.argv[1]), Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, path, tmp_path / "m"])
    while process.poll() is None and not list(tmp_path.glob(".m.partial-*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was still at work"
    assert not (tmp_path / "m").exists()
    assert list(tmp_path.glob(".m.partial-*"))
    gguf_read.import_gguf(path, tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "tiny.gguf"]


def test_too_little_room(write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    path = write_gguf()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    message = said(lambda: gguf_read.import_gguf(path, tmp_path / "out"))
    assert "1,000 are free" in message
    assert list(tmp_path.iterdir()) == [path]
