"""The one check of a model folder: what passes is computed as transformers computes it, and the rest is named."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from farthing.base.errors import UserError
from farthing.plans.inspect import inspect
from farthing.weights import decoder_config, load_decoder, save_decoder
from farthing.weights.check import check
from farthing.weights.export import export
from farthing.weights.folder import INDEX, SINGLE, read_config

PLAIN: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE = {
    "moe_intermediate_size": 16, "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
LATENT = {
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12,
    "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    "mistral": {**PLAIN, "head_dim": 8, "sliding_window": None},
    "mistral, sliding": {**PLAIN, "head_dim": 8, "sliding_window": 9},
    "qwen2": PLAIN,
    "qwen2, sliding": {**PLAIN, "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**PLAIN, "head_dim": 12},
    "qwen3_moe": {
        **PLAIN, "head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
        "norm_topk_prob": True,
    },
    "mixtral": {**PLAIN, "num_local_experts": 8, "num_experts_per_tok": 3},
    "phi3": {**PLAIN, "pad_token_id": 2, "num_attention_heads": 2, "partial_rotary_factor": 0.75},
    "gemma2": {
        **PLAIN, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 9, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **PLAIN, "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 9, "sliding_window_pattern": 2,
    },
    "gpt_oss": {
        **PLAIN, "head_dim": 12, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 9,
        "swiglu_limit": 0.7,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0,
        },
    },
    "olmo2": {**PLAIN, "pad_token_id": 2},
    "olmo3": {**PLAIN, "pad_token_id": 2, "sliding_window": 9, "num_hidden_layers": 4},
    "deepseek_v3": {**PLAIN, **LATENT, **MIXTURE},
    "deepseek_v2": {
        **PLAIN, **LATENT, **MIXTURE, "norm_topk_prob": False, "topk_method": "group_limited_greedy",
    },
    "glm4_moe": {**PLAIN, **MIXTURE, "partial_rotary_factor": 0.5, "use_qk_norm": True, "head_dim": 8},
}  # fmt: skip
# Keys that say nothing of the computation, and are not checked.
APART = {
    "model_type", "architectures", "transformers_version", "dtype", "initializer_range", "attention_dropout",
    "pretraining_tp", "embd_pdrop", "resid_pdrop", "router_jitter_noise", "router_aux_loss_coef",
}  # fmt: skip
# What transformers refuses by type alone, or stumbles over, and has one meaning all the same.
PASSED = (
    "rms_norm_eps=",
    "routed_scaling_factor=",
    "n_group",
    "topk_group",
    "head_dim=None",
    "layer_types=",
    "pad_token_id",
    "logit_softcapping=",
    "swiglu_limit=",
)
ODD: tuple[Any, ...] = (None, -1, "64", True, [], 1.5, 10**12, float("inf"))
SCALINGS: list[Any] = [
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "truncate": False},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 16, "beta_fast": 8, "beta_slow": 2},
    {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "llama3", "factor": 4.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "linear", "factor": 0.0},
    {"rope_type": "linear", "factor": float("nan")},
    {"rope_type": "linear", "factor": "2"},
    {"rope_type": "linear"},
    {"rope_type": "default", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": 3},
    {"factor": 2.0},
    "yarn",
]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers.logging.set_verbosity(level)
    transformers.logging.enable_progress_bar()


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """A function from a family to a folder of random weights that transformers wrote, and its config."""

    def make(family: str) -> tuple[Path, dict[str, Any]]:
        torch.manual_seed(7)
        config = AutoConfig.for_model(family.partition(",")[0], **FAMILIES[family])
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.3)
        folder = tmp_path / family
        model.save_pretrained(folder)
        return folder, read_config(folder)

    return make


def compare(folder: Path, config: dict[str, Any], what: str) -> str | None:
    """What is wrong: None if the folder is refused in one line, or computed as transformers computes it."""
    write(folder, config)
    try:
        ours = load_decoder(folder, torch.float32)
    except UserError as refused:
        return None if "\n" not in str(refused) else f"{what}: several lines"
    ids = torch.randint(0, 97, (1, min(40, ours.config.max_positions)))
    try:
        theirs, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
        )
        if info["missing_keys"]:
            return f"{what}: transformers misses {info['missing_keys']}"
        with torch.no_grad():
            expected = theirs.eval()(ids).logits
    except Exception as error:
        return (
            None
            if any(word in what for word in PASSED)
            else f"{what}: only transformers refuses: {error}"[:300]
        )
    with torch.no_grad():
        apart = float((ours(ids) - expected).abs().max())
    return None if apart < 1e-3 else f"{what}: logits are {apart} apart"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_or_odd_means_what_it_means_to_transformers(
    family: str, folder_of: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    folder, config = folder_of(family)
    load_decoder(folder)  # as it is, it passes
    wrong = []
    for key in config.keys() - APART:
        wrong.append(compare(folder, {k: v for k, v in config.items() if k != key}, f"without {key}"))
        wrong += [compare(folder, {**config, key: odd}, f"{key}={odd!r}") for odd in ODD]
    assert not list(filter(None, wrong))


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_rotary_scaling_means_what_it_means_to_transformers(
    family: str, folder_of: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    folder, config = folder_of(family)
    plain = {key: value for key, value in config.items() if key != "rope_parameters"}
    wrong, passed = [], 0
    for scaling in SCALINGS:
        new = {"rope_theta": 5000.0, **scaling} if isinstance(scaling, dict) else scaling
        for spelt in (
            {"rope_parameters": new},
            {"rope_scaling": scaling, "rope_theta": 5000.0},
            {"rope_scaling": scaling, "original_max_position_embeddings": 24},
        ):
            wrong.append(compare(folder, plain | spelt, str(spelt)))
            try:
                decoder_config(plain | spelt)
                passed += 1
            except UserError:
                pass
    assert not list(filter(None, wrong))
    assert passed > 25


def refused(folder: Path, tmp_path: Path) -> str:
    """The one message with which load, inspect and every export refuse a folder."""
    said = set()
    for action in (
        lambda: load_decoder(folder),
        lambda: inspect(folder),
        lambda: export(folder, "hf-bf16", tmp_path / "bf16"),
        lambda: export(folder, "hf-fp8", tmp_path / "fp8"),
    ):
        with pytest.raises(UserError) as caught:
            action()
        said.add(str(caught.value))
    assert not (tmp_path / "bf16").exists()
    assert len(said) == 1, said
    return said.pop()


@pytest.fixture
def llama(folder_of: Callable[[str], tuple[Path, dict[str, Any]]]) -> Path:
    return folder_of("llama")[0]


def change(folder: Path, changed: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / SINGLE), **changed}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / SINGLE)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({NORM: None}, "'model.norm.weight' is missing (1 in all)"),
        ({"odd.weight": torch.ones(3)}, "'odd.weight' is not part of a model of this family"),
        ({NORM: torch.ones(33)}, "'model.norm.weight' has shape (33,), config.json asks for (32,)"),
        (
            {NORM: torch.ones(32, dtype=torch.int64)},
            "model.norm.weight holds I64 numbers, not floating point",
        ),
        (
            {NORM: torch.ones(32, dtype=torch.bool)},
            "model.norm.weight holds BOOL numbers, not floating point",
        ),
        ({NORM: torch.full((32,), float("nan"))}, "model.norm.weight holds a NaN or an infinity"),
        ({NORM: torch.tensor([1.0] * 31 + [float("-inf")])}, "model.norm.weight holds a NaN or an infinity"),
        ({"lm_head.weight": torch.ones(97, 32).to(torch.float8_e4m3fn)}, "lm_head.weight is FP8 without"),
    ],
)
def test_wrong_tensors_are_refused_wherever_a_folder_is_read(
    changed: dict[str, torch.Tensor | None], said: str, llama: Path, tmp_path: Path
) -> None:
    change(llama, changed)
    assert said in refused(llama, tmp_path)


def test_a_stored_head_that_differs_is_the_models_head(llama: Path, tmp_path: Path) -> None:
    write(llama, read_config(llama) | {"tie_word_embeddings": True})
    ids = torch.arange(40)[None]
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()(ids).logits
    decoder = load_decoder(llama, torch.float32)
    torch.testing.assert_close(decoder(ids), expected, atol=1e-4, rtol=0)
    save_decoder(decoder, read_config(llama), tmp_path / "saved", tokenizer_from=None)
    export(llama, "hf-bf16", tmp_path / "bf16")
    assert [read_config(tmp_path / name)["tie_word_embeddings"] for name in ("saved", "bf16")] == [
        False,
        False,
    ]
    again = load_decoder(tmp_path / "saved", torch.float32)
    torch.testing.assert_close(again(ids), expected, atol=1e-4, rtol=0)


def test_a_stored_head_that_is_the_embedding_stays_tied(llama: Path) -> None:
    write(llama, read_config(llama) | {"tie_word_embeddings": True})
    change(llama, {"lm_head.weight": load_file(llama / SINGLE)["model.embed_tokens.weight"]})
    assert check(llama).config.tied_head


def test_more_layers_than_tensors_are_refused_at_once(llama: Path, tmp_path: Path) -> None:
    write(llama, read_config(llama) | {"num_hidden_layers": 10**6})
    assert "config.json asks for 1,000,000 layers, and there are 35 tensors" in refused(llama, tmp_path)
    write(llama, read_config(llama) | {"num_hidden_layers": 10**18})
    assert "must be a whole number of at least 1 and at most " in refused(llama, tmp_path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"final_logit_softcapping": 30.0},
            "final_logit_softcapping is 30.0, which changes what the model computes",
        ),
        ({"num_local_experts": 8}, "num_local_experts is 8"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; it must be the number of a token, or null"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0}},
            "rope_scaling.factor is 0; it must be a number above",
        ),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [1]}},
            "rope_scaling.mrope_section is not supported",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": None}},
            "rope_scaling.original_max_position_embeddings is None; it must be a whole number",
        ),
        ({"vocab_size": "x" * 1000}, "vocab_size is 'xxxxx"),
        ({"is_causal": False}, "is_causal is False, which changes what the model computes"),
        ({"text_config": {"tie_word_embeddings": True}}, "text_config is {'tie_word_embeddings': True}"),
        ({"dtype": 5}, "dtype 5 is not supported; supported: float64"),
        ({"torch_dtype": "int8"}, "torch_dtype 'int8' is not supported; supported: float64"),
        ({"initializer_range": "x"}, "initializer_range is 'x'; it must be a number of at least 0"),
        ({"pad_token_id": 97}, "pad_token_id is 97; it must be below the 97 of vocab_size, or null"),
    ],
)
def test_a_setting_that_is_refused_is_named(
    changed: dict[str, Any], said: str, llama: Path, tmp_path: Path
) -> None:
    write(llama, read_config(llama) | changed)
    message = refused(llama, tmp_path)
    assert said in message
    assert len(message) < 300


def test_layers_slide_as_in_transformers() -> None:
    def windows(model_type: str, **changed: Any) -> list[int | None]:
        config = decoder_config({**FAMILIES[model_type], "model_type": model_type, **changed})
        assert config.max_positions == 64
        return [config.window_of(layer) for layer in range(config.num_layers)]

    assert windows("mistral", sliding_window=16) == [16, 16]
    assert windows("mistral") == [None, None]
    assert windows("qwen2", sliding_window=16) == [None, None], "not used"
    assert windows("qwen2", sliding_window=16, use_sliding_window=True) == [None, None], "from layer 28 on"
    used = {"sliding_window": 16, "use_sliding_window": True}
    assert windows("qwen3", **used, max_window_layers=1) == [None, 16]
    assert windows("qwen2", **used, layer_types=["sliding_attention", "full_attention"]) == [16, None]
    assert windows("qwen3_moe", **used) == [16, 16]


@pytest.mark.parametrize(
    ("model_type", "changed", "said"),
    [
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "there is no sliding_window in use"),
        ("qwen2", {"layer_types": ["full_attention"]}, "for each of the 2 layers"),
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 2},
            "supported is a list of full_attention or sliding",
        ),
        (
            "mistral",
            {"sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"]},
            "leave it out",
        ),
        *(
            (kind, {"layer_types": ["full_attention", "sliding_attention"]}, f"which a {kind} does not have")
            for kind in ("llama", "olmo2", "deepseek_v3", "glm4_moe")
        ),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1; it must be a whole number"),
    ],
)
def test_windows_that_mean_nothing_are_refused(model_type: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        decoder_config({**FAMILIES[model_type], "model_type": model_type, **changed})


def test_yarn_reaches_as_far_as_it_says() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    qwen = {
        **PLAIN,
        "model_type": "qwen3",
        "head_dim": 12,
        "max_position_embeddings": 40960,
        "rope_scaling": yarn,
    }
    assert decoder_config(qwen).max_positions == 131_072


def test_kimi_k2_is_deepseek_v3(
    folder_of: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    folder, config = folder_of("deepseek_v3")
    expected = load_decoder(folder, torch.float32)
    write(folder, config | {"model_type": "kimi_k2"})
    ours = load_decoder(folder, torch.float32)
    ids = torch.arange(40)[None]
    assert torch.equal(ours(ids), expected(ids))
    save_decoder(ours, read_config(folder), tmp_path / "saved", tokenizer_from=None)
    assert read_config(tmp_path / "saved")["model_type"] == "deepseek_v3"
    assert inspect(folder)["family"] == "deepseek_v3"


def test_a_folder_that_holds_something_else_is_told_what_it_holds(llama: Path, tmp_path: Path) -> None:
    (llama / SINGLE).rename(llama / "model-00001-of-00002.safetensors")
    assert f"holds model-00001-of-00002.safetensors but no {INDEX}" in refused(llama, tmp_path)
    (llama / "adapter_config.json").write_text("{}")
    assert "holds a LoRA adapter, not a whole model; merge it into its base first" in refused(llama, tmp_path)


def test_programs_that_a_folder_names_are_neither_run_nor_written(llama: Path, tmp_path: Path) -> None:
    """A known family with `auto_map` is that family, here as in transformers without trust_remote_code."""
    ids = torch.arange(20)[None]
    plain = load_decoder(llama, torch.float32)(ids)
    code = "raise SystemExit('was run')\n"
    (llama / "modeling_own.py").write_text(code)
    config = read_config(llama)
    named = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (llama / "config.json").write_text(json.dumps({**config, "auto_map": named}))
    decoder = load_decoder(llama, torch.float32)
    assert torch.equal(decoder(ids), plain)
    theirs = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, plain, atol=1e-4, rtol=0)
    saved = save_decoder(decoder, read_config(llama), tmp_path / "saved", None)
    export(llama, "hf-bf16", tmp_path / "exported")
    for folder in (saved, tmp_path / "exported"):
        assert "auto_map" not in read_config(folder)
        AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True
        )  # there is no program to look for


def test_a_folder_is_checked_and_loaded_without_torchs_compiler(tiny_model: Path) -> None:
    """Which takes a second and a half to import, and has nothing to do with it."""
    code = "import sys; from pathlib import Path; from farthing.weights import load_decoder; "
    code += (
        "load_decoder(Path(sys.argv[1])); print([m for m in ('torch._dynamo', 'sympy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_model], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
