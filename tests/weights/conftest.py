"""What the parity tests share: transformers' model with random weights, ours from its folder, and the comparison."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from farthing.model.kernels import experts as kernel
from farthing.model.kernels import rows
from farthing.weights import load_decoder, save_decoder
from farthing.weights.folder import read_config


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SimpleNamespace]:
    """A function from transformers' config to `.theirs`, `.ours` and `.folder`: every parameter and every correction is
    random, so that none of them does nothing."""

    def make(config: Any, quieter: float = 1.0) -> SimpleNamespace:
        torch.manual_seed(7)
        theirs = transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), experts_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
                if "_a_proj" in name:
                    parameter.mul_(quieter)
            for name, buffer in theirs.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0.0, 0.2)
        folder = tmp_path_factory.mktemp("theirs")
        theirs.save_pretrained(folder)
        return SimpleNamespace(theirs=theirs.eval(), ours=load_decoder(folder, torch.float32), folder=folder)

    return make


@pytest.fixture
def same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The three comparisons of a pair: `.logits(pair)`, `.gradients(pair, path)` and `.saved(pair)`."""

    def logits(pair: SimpleNamespace) -> None:
        ids = torch.randint(0, 97, (2, 90), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, got = pair.theirs(ids).logits, pair.ours(ids)
        assert expected.std() > 0.1
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    def gradients(pair: SimpleNamespace, experts: str) -> None:
        """`experts` says how ours are computed: `padded` to one length, `each` by itself, or in `ragged` rows."""
        if experts != "padded":
            monkeypatch.setattr(rows, "PAD_TO", 1)
            monkeypatch.setattr(rows, "MOST_PADDING", 0)
            monkeypatch.setattr(kernel, "ragged_works", lambda x, inner: experts == "ragged")
        ids = torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(2))
        for model, out in ((pair.theirs, pair.theirs(ids).logits), (pair.ours, pair.ours(ids))):
            model.zero_grad()
            F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        carrier = copy.deepcopy(
            pair.ours
        )  # gradients go over to their names by being saved as if they were weights
        with torch.no_grad():
            for (name, parameter), ours in zip(
                carrier.named_parameters(), pair.ours.parameters(), strict=True
            ):
                if parameter.requires_grad:
                    parameter.copy_(ours.grad if ours.grad is not None else torch.zeros_like(ours))
                    assert ours.grad is not None or "experts" in name
        carried = dict(_save_and_load(carrier, pair.folder, tmp_path / "gradients")[0].named_parameters())
        largest = 0.0
        for name, parameter in pair.theirs.named_parameters():
            torch.testing.assert_close(
                carried[name], parameter.grad, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
            largest = max(largest, float(parameter.grad.abs().max()) if parameter.numel() else 0.0)
        assert largest > 0.01

    def saved(pair: SimpleNamespace) -> None:
        again, report = _save_and_load(pair.ours, pair.folder, tmp_path / "again")
        shapes = {name: tensor.numel() for name, tensor in pair.theirs.state_dict().items()}
        assert [name for name in report["missing_keys"] if shapes[name]] == []
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        state = again.state_dict()
        for name, tensor in pair.theirs.state_dict().items():
            assert torch.equal(state[name], tensor), name
        ids = torch.randint(0, 97, (2, 30), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            assert torch.equal(again.eval()(ids).logits, pair.theirs(ids).logits)

    return SimpleNamespace(logits=logits, gradients=gradients, saved=saved)


def _save_and_load(decoder: Any, like: Path, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Our network saved and read by transformers, with what it says about the keys."""
    save_decoder(decoder, read_config(like), folder, tokenizer_from=None)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )


# ---- exports: small random folders of every family, and llama.cpp in a process of its own ----

PLAIN: dict[str, Any] = {
    "hidden_act": "silu", "vocab_size": 336, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **{key: value for key, value in PLAIN.items() if key != "head_dim"},
    "num_hidden_layers": 3, "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16, "v_head_dim": 24, "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 32,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "num_nextn_predict_layers": 1,
    "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
V2 = {
    "q_lora_rank": None, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0, "scoring_func": "softmax", "topk_method": "greedy", "n_shared_experts": 2,
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip

LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama, llama_cpp

# Some builds contain AMX code for repacked weights, which ends the process where the system withholds AMX.
defaults = llama_cpp.llama_model_default_params
def without_repacking():
    parameters = defaults()
    parameters.use_extra_bufts = False
    return parameters
llama_cpp.llama_model_default_params = without_repacking

asked = json.load(sys.stdin)
files = []
for path in asked["paths"]:
    model = Llama(path, n_ctx=256, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0,
                  flash_attn=False, verbose=False)
    answers = []
    for ids in asked["ids"]:
        model.reset()
        model.eval(ids)
        for _ in range(asked["greedy"]):
            ids = [*ids, int(np.argmax(model.scores[len(ids) - 1]))]
            model.eval(ids[-1:])
        answers.append({"ids": ids, "logits": [] if asked["greedy"] else model.scores[: len(ids)].tolist()})
    texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in asked["texts"]]
    files.append({"answers": answers, "texts": texts, "metadata": model.metadata})
    model.close()
json.dump(files, sys.stdout)
"""


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a tokenizer of 330 ids, as the pretraining stage makes it."""
    from farthing.data.bpe import train_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    text = "State the final answer: 12 + 34 = 46. The quick brown fox jumps over the lazy dog, twice!\n"
    train_tokenizer([text * 3, "def f(x):\n    return x**2  # naïve café\n" * 4] * 20, 330, folder)
    return folder


@pytest.fixture
def make_folder(tmp_path: Path, tokenizer_folder: Path) -> Callable[..., Path]:
    """A function that writes a folder of random float32 weights: of PLAIN's or DEEPSEEK's sizes, changed as asked."""

    def make(family: str = "deepseek_v3", name: str = "model", **changed: Any) -> Path:
        from farthing.model import Decoder
        from farthing.weights import decoder_config

        base = DEEPSEEK if family.startswith("deepseek") else PLAIN
        base = base | V2 if family == "deepseek_v2" else base
        hf = base | {"model_type": family, "architectures": [CLASSES[family]]} | changed
        decoder = Decoder(decoder_config(hf))
        decoder.init_weights(seed=0, std=0.2)
        draw = torch.Generator().manual_seed(1)
        for parameter in decoder.parameters():
            if parameter.dim() == 1:  # norms and biases that are not all alike, so that a swap would show
                parameter.data += torch.randn(parameter.shape, generator=draw) * 0.05
        return save_decoder(decoder, hf, tmp_path / name, tokenizer_from=tokenizer_folder)

    return make


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., list[dict[str, Any]]]:
    """A function that runs llama.cpp on .gguf files and gives for each: `answers` to prompts of ids (their ids with
    `greedy` tokens added, and logits [N, V] where none are), the ids of `texts`, and its `metadata`. Skips with the
    reason where llama.cpp cannot run."""
    pytest.importorskip("llama_cpp")

    def run(
        paths: list[Path], ids: list[list[int]] | None = None, greedy: int = 0, texts: list[str] | None = None
    ) -> list[dict[str, Any]]:
        files = [str(path) for path in paths]
        asked = json.dumps({"paths": files, "ids": ids or [], "greedy": greedy, "texts": texts or []})
        # torch and llama.cpp in one process bring two OpenMP libraries, which can crash
        command = [sys.executable, "-c", LLAMA_CPP]
        done = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=1200)
        if done.returncode < 0:
            pytest.skip(f"llama_cpp cannot run on this machine: signal {-done.returncode}")
        assert done.returncode == 0, done.stderr[-2000:]
        found: list[dict[str, Any]] = json.loads(done.stdout)
        for answer in [answer for file in found for answer in file["answers"]]:
            answer["logits"] = torch.tensor(answer["logits"])
        return found

    return run
