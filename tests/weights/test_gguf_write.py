"""Exporting .gguf: against our own importer, against llama.cpp running the file, and every refusal."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import farthing
from farthing.base import files
from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.weights import gguf_write, load_decoder
from farthing.weights.folder import read_config, read_tensors
from farthing.weights.gguf_read import import_gguf
from farthing.weights.gguf_write import export_gguf

Make = Callable[..., Path]
LlamaCpp = Callable[..., list[dict[str, Any]]]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN_CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, llama3 stretching": {"rope_theta": 500_000.0, "rope_scaling": LLAMA3},
    "llama, linear stretching": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "llama, yarn": {"rope_scaling": YARN},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
}
DEEPSEEK_CASES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "deepseek_v3, no stretching": {"rope_scaling": None},
    "deepseek_v3, half the yarn": {"mscale": 0.707},
    "deepseek_v3, no q rank, no groups, tied": {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "tie_word_embeddings": True
    },
    "deepseek_v3, two shared, not normalised": {"n_shared_experts": 2, "norm_topk_prob": False},
    "deepseek_v2": {},
}  # fmt: skip


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def made(make_folder: Make, case: str, cases: dict[str, dict[str, Any]], name: str = "model") -> Path:
    changed = dict(cases[case])
    if mscale := changed.pop("mscale", None):
        scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
        changed["rope_scaling"] = scaling | {"mscale": mscale, "mscale_all_dim": mscale}
    return make_folder(case.partition(",")[0], name=name, **changed)


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, 330, length).tolist() for length in (1, 17, 100)]


# ---- what comes back ----


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_our_importer_gives_the_same_model_back(case: str, make_folder: Make, tmp_path: Path) -> None:
    folder = made(make_folder, case, PLAIN_CASES)
    assert export_gguf(folder, tmp_path / "m.gguf", "bf16") == []
    back = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    before, after = dict(read_tensors(folder)), dict(read_tensors(back))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].bfloat16(), after[name]), name
    ours, theirs = read_config(folder), read_config(back)
    for key in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "eos_token_id"):
        assert ours[key] == theirs[key], key
    kind = (ours.get("rope_scaling") or {"rope_type": "default"})["rope_type"]
    assert theirs["rope_parameters"]["rope_type"] == kind


def test_llama_cpp_computes_what_we_compute(make_folder: Make, tmp_path: Path, llama_cpp: LlamaCpp) -> None:
    cases = PLAIN_CASES | DEEPSEEK_CASES
    folders = [made(make_folder, case, cases, name=f"folder {case}") for case in cases]
    files = [tmp_path / f"{folder.name}.gguf" for folder in folders]
    for folder, file in zip(folders, files, strict=True):
        export_gguf(folder, file, "f32")
    for case, folder, file in zip(cases, folders, llama_cpp(files, prompts()), strict=True):
        decoder = load_decoder(folder, torch.float32)
        for ids, answer in zip(prompts(), file["answers"], strict=True):
            with torch.no_grad():
                ours = decoder(torch.tensor([ids]))[0]
            assert ours.std() > 0.5
            difference = (answer["logits"] - ours).abs().max()
            assert difference < 1e-3, f"{case}, {len(ids)} tokens: {difference}"


def test_each_type_is_as_near_as_its_bits_allow(
    make_folder: Make, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    folder, ids = make_folder("llama"), prompts()[1]
    allowed = {"f16": 2e-3, "bf16": 2e-2, "q8_0": 0.1, "q5_1": 0.3, "q5_0": 0.4, "q4_1": 0.5, "q4_0": 0.6}
    for kind in allowed:
        export_gguf(folder, tmp_path / f"{kind}.gguf", kind)
    files = llama_cpp([tmp_path / f"{kind}.gguf" for kind in allowed], [ids])
    with torch.no_grad():
        ours = load_decoder(folder, torch.float32)(torch.tensor([ids]))[0]
    for kind, file in zip(allowed, files, strict=True):
        difference = (file["answers"][0]["logits"] - ours).std() / ours.std()
        assert allowed[kind] / 100 < difference < allowed[kind], kind


def test_super_blocks_are_computed_as_we_read_them(
    make_folder: Make, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    """llama.cpp rounds what it multiplies them with to 8 bits, so the two are near and not equal."""
    folder = make_folder("llama", hidden_size=256, head_dim=64, intermediate_size=512, num_hidden_layers=1)
    export_gguf(folder, tmp_path / "m.gguf", "q4_k")
    back, ids = import_gguf(tmp_path / "m.gguf", tmp_path / "back"), prompts()[1]
    [file] = llama_cpp([tmp_path / "m.gguf"], [ids])
    with torch.no_grad():
        whole, read = (load_decoder(one, torch.float32)(torch.tensor([ids]))[0] for one in (folder, back))
    theirs = file["answers"][0]["logits"]
    assert (theirs - read).std() < 0.25 * (read - whole).std()


def test_the_latent_tensors_are_split_and_stacked_as_llama_cpp_wants_them(
    make_folder: Make, tmp_path: Path
) -> None:
    """Each number found again by its own indices, apart from the code that moved it."""
    from gguf import GGUFReader

    folder = make_folder()
    notes = export_gguf(folder, tmp_path / "m.gguf", "f32")
    file = {
        tensor.name: np.asarray(tensor.data).reshape(tensor.shape[::-1])
        for tensor in GGUFReader(tmp_path / "m.gguf").tensors
    }
    tensors = {name: tensor.numpy() for name, tensor in read_tensors(folder)}
    kv_b = tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    heads, nope, value, rank = 4, 16, 24, 32
    k_b, v_b = file["blk.1.attn_k_b.weight"], file["blk.1.attn_v_b.weight"]
    assert (k_b.shape, v_b.shape) == ((heads, rank, nope), (heads, value, rank))
    for head, latent in ((0, 0), (1, 31), (3, 7)):
        first = head * (nope + value)
        assert np.array_equal(k_b[head, latent], kv_b[first : first + nope, latent])
        assert np.array_equal(v_b[head, :, latent], kv_b[first + nope : first + nope + value, latent])
    for part in ("gate", "up", "down"):
        stacked = file[f"blk.2.ffn_{part}_exps.weight"]
        assert len(stacked) == 8
        assert np.array_equal(stacked[5], tensors[f"model.layers.2.mlp.experts.5.{part}_proj.weight"])
    bias = tensors["model.layers.2.mlp.gate.e_score_correction_bias"]
    assert np.array_equal(file["blk.2.exp_probs_b.bias"], bias)
    assert not any(name.startswith("blk.3.") for name in file), "the prediction module"
    assert len(notes) == 1
    assert "MTP" in notes[0]


def test_the_metadata_of_a_latent_model(make_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    export_gguf(make_folder(), tmp_path / "m.gguf", "q8_0")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.architecture"] == "deepseek2"
    expected = {
        "attention.head_count_kv": 1, "attention.key_length": 48, "attention.value_length": 32,
        "attention.key_length_mla": 32, "attention.value_length_mla": 24, "attention.q_lora_rank": 48,
        "attention.kv_lora_rank": 32, "rope.dimension_count": 16, "leading_dense_block_count": 1, "block_count": 3,
        "expert_count": 8, "expert_used_count": 3, "expert_shared_count": 1, "expert_group_count": 4,
        "expert_group_used_count": 2, "expert_weights_norm": True, "expert_gating_func": 2,
        "expert_weights_scale": 2.5, "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0,
        "rope.scaling.original_context_length": 32,
    }  # fmt: skip
    for key, value in expected.items():
        assert fields[f"deepseek2.{key}"] == value, key
    assert fields["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)


def test_an_fp8_folder_is_exported_by_what_it_means(make_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    from farthing.weights.fp8 import QUANTIZATION_CONFIG, dequantise, quantise

    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    stored, scale = quantise(tensors.pop(name))
    save_file({**tensors, name: stored, f"{name}_scale_inv": scale}, folder / "model.safetensors")
    write_json(folder / "config.json", read_config(folder) | {"quantization_config": QUANTIZATION_CONFIG})
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    [up] = [t for t in GGUFReader(tmp_path / "m.gguf").tensors if t.name == "blk.0.ffn_up.weight"]
    assert np.array_equal(up.data, dequantise(stored, scale).numpy())


def test_large_tensors_are_converted_in_pieces(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder()
    export_gguf(folder, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr(gguf_write, "_PIECE", 64 * 5)
    export_gguf(folder, tmp_path / "pieces.gguf", "q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()


def test_the_licence_and_the_chat_template_go_along(make_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = make_folder("llama")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    export_gguf(folder, tmp_path / "m.gguf")
    fields = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert fields["general.license"] == "mit"
    assert fields["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "deepseek"])
def test_llama_cpp_answers_twenty_prompts_with_the_same_tokens(
    family: str, smollm2: Path, make_folder: Make, tmp_path: Path, llama_cpp: LlamaCpp
) -> None:
    """SmolLM2 in words, and a random DeepSeek-V3 in noise: greedy, 20 prompts, up to 24 tokens."""
    folder = smollm2 if family == "llama" else make_folder()
    beasts = [
        "fox", "owl", "cat", "dog", "bee", "cow", "hen", "pig", "rat", "ant",
        "bat", "elk", "emu", "ape", "eel", "cod", "gnu", "jay", "ram", "yak",
    ]  # fmt: skip
    asked = [f"Once upon a time there was a {beast} who wanted to" for beast in beasts]
    encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode
    prompts = [encode(text).ids for text in asked]
    model = farthing.load(str(folder), dtype=torch.float32)
    done = model.generate(asked, max_new_tokens=24, temperature=0.0)
    ours = [[*prompt, *completion.ids] for prompt, completion in zip(prompts, done, strict=True)]
    assert sum(len(completion.ids) for completion in done) > 300
    # Rounding to 8 bits, of the activations too, turns a close decision now and then; in noise all of them are close.
    least = {"f32": 20, "f16": 20, "bf16": 20, "q8_0": 10} if family == "llama" else {"f32": 20}
    for kind, wanted in least.items():
        export_gguf(folder, tmp_path / f"{kind}.gguf", kind)
        [file] = llama_cpp([tmp_path / f"{kind}.gguf"], prompts, greedy=24)
        same = [a["ids"][: len(ids)] == ids for a, ids in zip(file["answers"], ours, strict=True)]
        assert sum(same) >= wanted, f"{kind}: {sum(same)} of 20"
        print(f"{kind}: {sum(same)} of 20 the same")


# ---- refusals ----


def change(folder: Path, **changed: Any) -> Path:
    write_json(folder / "config.json", read_config(folder) | changed)
    return folder


@pytest.mark.parametrize(
    ("family", "changed", "named"),
    [
        ("deepseek_v3", {"n_shared_experts": 0}, "shared experts"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}, "groups"),
        ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "mscale"),
        ("llama", {"rope_scaling": YARN | {"attention_factor": 1.0}}, "yarn"),
        ("llama", {"attention_bias": True}, "biases"),
        ("qwen3", {"attention_bias": True}, "biases"),
    ],
)
def test_what_a_gguf_cannot_say(
    family: str, changed: dict[str, Any], named: str, make_folder: Make, tmp_path: Path
) -> None:
    folder = make_folder(family, **changed)
    assert named in said(lambda: export_gguf(folder, tmp_path / "m.gguf"))
    assert not (tmp_path / "m.gguf").exists()


def test_a_family_llama_cpp_is_not_told_of(make_folder: Make, tmp_path: Path) -> None:
    folder = change(make_folder("llama"), model_type="mamba")
    assert "'mamba'" in said(lambda: export_gguf(folder, tmp_path / "m.gguf"))


def test_tensors_that_do_not_fit_the_config(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    norm = "model.norm.weight"

    def export_with(changed: dict[str, torch.Tensor | None]) -> str:
        kept = {name: tensor for name, tensor in (tensors | changed).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors")
        return said(lambda: export_gguf(folder, tmp_path / "m.gguf"))

    assert f"{norm!r} is missing" in export_with({norm: None})
    assert f"{norm!r} has shape (65,)" in export_with({norm: torch.ones(65)})
    assert "'odd' is not part of" in export_with({"odd": torch.ones(2)})


def test_a_number_too_large_for_f16(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 7e4
    save_file(tensors, folder / "model.safetensors")
    message = said(lambda: export_gguf(folder, tmp_path / "m.gguf"))
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "--type bf16" in message
    assert not list(tmp_path.glob("*.gguf*")) + list(tmp_path.glob(".*partial*")), "nothing is left behind"
    export_gguf(folder, tmp_path / "m.gguf", "bf16")


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k"])
def test_blocks_whose_scales_are_f16_hold_no_more(kind: str, make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e9
    save_file(tensors, folder / "model.safetensors")
    assert "beyond f16" in said(lambda: export_gguf(folder, tmp_path / "m.gguf", kind))


def test_rows_that_blocks_do_not_divide_are_said(make_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = make_folder("llama", hidden_size=64, intermediate_size=256)
    [note] = export_gguf(folder, tmp_path / "m.gguf", "q4_k")
    assert note == "differs: 12 of 16 matrices are q5_0: q4_k has no blocks that divide rows of 64"
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K"
    assert kinds["blk.0.ffn_up.weight"] == "Q5_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    odd = make_folder("llama", name="odd", intermediate_size=100)
    [note] = export_gguf(odd, tmp_path / "odd.gguf", "q8_0")
    assert "2 of 16 matrices are f16: q8_0 has no blocks that divide rows of 100" in note


def test_a_name_that_is_no_gguf(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder("llama")
    for path in (folder / "config.json", tmp_path):
        assert "ends in .gguf" in said(lambda path=path: export_gguf(folder, path))
    assert json.loads((folder / "config.json").read_text())


def test_too_little_room(make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder("llama")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "1,000 are free" in said(lambda: export_gguf(folder, tmp_path / "m.gguf"))


def test_a_disk_that_fills_up_leaves_the_old_file(
    make_folder: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = make_folder("llama"), tmp_path / "m.gguf"
    export_gguf(folder, path)
    whole = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(files, "sync", full)
    assert "no room on the disk" in said(lambda: export_gguf(folder, path))
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize("case", DEEPSEEK_CASES)
@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_deepseek_comes_back_too(case: str, kind: str, make_folder: Make, tmp_path: Path) -> None:
    folder = made(make_folder, case, DEEPSEEK_CASES)
    export_gguf(folder, tmp_path / "m.gguf", kind)
    back = import_gguf(tmp_path / "m.gguf", tmp_path / "back")
    before, after = dict(read_tensors(folder)), dict(read_tensors(back))
    left_out = {name for name in before if name.startswith("model.layers.3.")}  # the prediction module
    assert before.keys() - left_out == after.keys()
    for name in after:
        if name.endswith("e_score_correction_bias"):
            assert torch.equal(before[name], after[name]), name
        elif kind == "bf16":
            assert torch.equal(before[name].bfloat16(), after[name]), name
        else:
            assert (before[name].float() - after[name].float()).abs().max() < 0.02 * before[
                name
            ].abs().max(), name
    one, two = load_decoder(folder, torch.float32), load_decoder(back, torch.float32)
    [ids] = prompts()[:1]
    with torch.no_grad():
        apart = (one(torch.tensor([ids])) - two(torch.tensor([ids]))).abs().max()
    assert apart < (0.2 if kind == "bf16" else 2.0), "nothing is read in another way"
    ours, theirs = one.config, two.config
    assert theirs == dataclasses.replace(ours, mtp_depth=0, moe=theirs.moe)
    assert theirs.moe is not None
    assert ours.moe is not None
    assert dataclasses.replace(theirs.moe, groups=1, top_groups=1) == dataclasses.replace(
        ours.moe, groups=1, top_groups=1
    )
