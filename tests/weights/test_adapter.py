"""LoRA folders, held against peft."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import farthing
from farthing.base.errors import UserError
from farthing.weights.sources import model_folder

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(4, 60).view(2, 28)


@pytest.fixture(scope="module")
def make_adapter(tiny_model, tmp_path_factory):
    """A function that saves a random adapter of `tiny_model` with peft; returns its folder and peft's logits."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")

    def make(targets=("q_proj", "v_proj"), rank=4, base=tiny_model, **settings):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = peft.LoraConfig(
            r=rank, lora_alpha=12, target_modules=list(targets), task_type="CAUSAL_LM", **settings
        )
        model = peft.get_peft_model(model, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0.0, 0.05)
            logits = model.eval()(IDS).logits
        folder = tmp_path_factory.mktemp("adapter") / "lora"
        model.save_pretrained(folder)
        return folder, logits

    return make


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"targets": ALL, "rank": 3},
        {"targets": ALL, "use_rslora": True},
        {"targets": ALL, "rank_pattern": {"q_proj": 2, "down_proj": 7}},
        {"targets": ["k_proj"], "layers_to_transform": [1]},
    ],
    ids=["two", "all", "rslora", "ranks", "a layer"],
)
def test_logits_are_those_of_peft(make_adapter, tiny_model, settings):
    folder, expected = make_adapter(**settings)
    model = farthing.load(folder, dtype="float32", device="cpu")
    with torch.no_grad():
        found = model.logits(IDS)
        plain = farthing.load(tiny_model, dtype="float32", device="cpu").logits(IDS)
    assert (found - expected).abs().max() < 1e-4
    assert (plain - expected).abs().max() > 1e-2


def test_what_the_adapter_leaves_alone_is_shared(make_adapter, tiny_model):
    folder, expected = make_adapter(["q_proj"])
    base = farthing.load(tiny_model, dtype="float32", device="cpu")
    before = base.logits(IDS)
    tuned = base.adapted(folder)
    mine = dict(base.decoder.named_parameters())
    own = {
        name for name, value in tuned.decoder.named_parameters() if value.data_ptr() != mine[name].data_ptr()
    }
    assert own == {"layers.0.attention.qkv.weight", "layers.1.attention.qkv.weight"}
    assert tuned.decoder.head.weight is tuned.decoder.embed.weight
    assert (tuned.logits(IDS) - expected).abs().max() < 1e-4
    assert torch.equal(base.logits(IDS), before)


def test_an_adapted_model_generates_and_is_saved_merged(make_adapter, tmp_path):
    folder, _ = make_adapter(ALL)
    model = farthing.load(folder, dtype="float32", device="cpu")
    said = model.chat([{"role": "user", "content": "hi"}], max_new_tokens=4, temperature=0.0)
    again = farthing.load(model.save(tmp_path / "merged"), dtype="float32", device="cpu")
    assert torch.equal(again.logits(IDS), model.logits(IDS))
    assert again.chat([{"role": "user", "content": "hi"}], max_new_tokens=4, temperature=0.0).ids == said.ids


def test_a_tokenizer_beside_the_adapter_is_taken(make_adapter, tiny_model):
    folder, _ = make_adapter()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert farthing.load(folder, device="cpu").tokenizer.render([{"role": "user", "content": "hi"}]) == "hi"


def test_a_base_beside_the_adapter(make_adapter, tiny_model):
    folder, _ = make_adapter()
    (folder / "base").symlink_to(tiny_model)
    change(folder, base_model_name_or_path="base")
    farthing.load(folder, device="cpu")


def change(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA is read"),
        ({"use_dora": True}, "use_dora: true is not supported; merge the adapter with peft"),
        ({"bias": "all"}, "bias: 'all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: "),
        ({"lora_alpha": "8"}, "lora_alpha is '8'; it must be a number"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is nothing; let it name the base model"),
        ({"base_model_name_or_path": "/nowhere/base"}, "/nowhere/base does not exist"),
    ],
)
def test_settings_that_are_not_built_are_refused_by_name(make_adapter, settings, said):
    folder, _ = make_adapter()
    change(folder, **settings)
    with pytest.raises(UserError, match=r"^[^\n]*$") as found:
        farthing.load(folder, device="cpu")
    assert said in str(found.value)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda t: t.update({k: v[:, :8] for k, v in t.items() if "lora_A" in k}),
            "was it trained on another base?",
        ),
        (
            lambda t: t.update({k.replace("q_proj", "qkv_proj"): t.pop(k) for k in list(t)}),
            "changes model.layers.0.self_attn.qkv_proj, which its base",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "lora_B" in k], "lacks lora_B; save the adapter again"),
        (
            lambda t: t.update({k: v[:2] for k, v in t.items() if "lora_A" in k}),
            "lora_A has rank 2 and lora_B 4",
        ),
        (lambda t: t.update({k: v / 0 for k, v in t.items()}), "holds a NaN or an infinity"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}),
            "is no part of a LoRA update",
        ),
        (lambda t: t.update({k: v.flatten() for k, v in t.items()}), "it must be a matrix of numbers"),
        (lambda t: t.clear(), "holds no update"),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_a_line(make_adapter, edit, said):
    folder, _ = make_adapter(["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=r"^[^\n]*$") as found:
        farthing.load(folder, device="cpu")
    assert said in str(found.value)


def test_a_missing_or_damaged_file_is_named(make_adapter):
    folder, _ = make_adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is cut short or damaged"):
        farthing.load(folder, device="cpu")
    path.unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        farthing.load(folder, device="cpu")


def test_an_adapter_of_an_adapter_is_refused(make_adapter):
    folder, _ = make_adapter()
    other, _ = make_adapter()
    change(folder, base_model_name_or_path=str(other))
    with pytest.raises(UserError, match="is an adapter too; merge that one first"):
        farthing.load(folder, device="cpu")


def test_where_a_whole_model_is_needed_the_way_to_one_is_told(make_adapter):
    folder, _ = make_adapter()
    with pytest.raises(UserError, match=r"merge it into its base first \(farthing.load\("):
        model_folder(folder)
