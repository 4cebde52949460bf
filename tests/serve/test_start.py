"""Loading what is served."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from farthing.base.errors import UserError
from farthing.serve.safety import Policy
from farthing.serve.served import Served
from farthing.serve.start import Settings, _check_policy, _loaded

IDS = torch.arange(4, 24).view(1, 20)


@pytest.fixture
def adapter(tmp_path):
    """A function that writes an adapter of a base by its name."""

    def make(base, width=64):
        folder = tmp_path / "lora"
        folder.mkdir()
        settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "base_model_name_or_path": str(base)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        draw = torch.Generator().manual_seed(0)
        module = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{module}.lora_A.weight": torch.randn(2, width, generator=draw),
            f"{module}.lora_B.weight": torch.randn(64, 2, generator=draw),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    return make


def load(quantize="exact", **sources):
    return _loaded(Settings({name: str(source) for name, source in sources.items()}, quantize=quantize))


def shared(one, other):
    theirs = dict(other.decoder.named_parameters())
    return {
        name for name, mine in one.decoder.named_parameters() if mine.data_ptr() == theirs[name].data_ptr()
    }


def test_an_adapter_beside_its_base_shares_its_tensors(tiny_model, adapter):
    models = load(base=tiny_model, tuned=adapter(tiny_model))
    own = dict(models["base"].decoder.named_parameters()).keys() - shared(models["tuned"], models["base"])
    assert own == {"layers.0.attention.qkv.weight"}
    assert not torch.equal(models["tuned"].logits(IDS), models["base"].logits(IDS))


def test_an_adapter_alone_loads_its_base(tiny_model, adapter):
    models = load(tuned=adapter(tiny_model))
    assert list(models) == ["tuned"]


@pytest.mark.parametrize("by", ["folder", "name"])
def test_a_base_on_the_hub_is_the_one_served_under_its_name(tiny_model, adapter, tmp_path, by):
    folder = adapter("some-owner/Tiny-100K")
    (tmp_path / "Tiny-100K").symlink_to(tiny_model)
    models = (
        load(base=tmp_path / "Tiny-100K", t=folder)
        if by == "folder"
        else load(**{"Tiny-100K": tiny_model}, t=folder)
    )
    assert shared(models["t"], next(iter(models.values())))


def test_rounded_models_share_nothing(tiny_model, adapter):
    models = load(quantize="int8", base=tiny_model, tuned=adapter(tiny_model))
    assert models["tuned"].quantize == "int8"
    assert "layers.1.feedforward.down.weight" not in shared(models["tuned"], models["base"])


def test_an_adapter_of_another_base_is_refused_in_a_line(tiny_model, adapter, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "other")
    with pytest.raises(UserError, match=r"^[^\n]*was it trained on another base\?$"):
        load(base=tiny_model, tuned=adapter(tmp_path / "other", width=48))


@pytest.mark.parametrize("takes", [True, False])
def test_a_policy_that_a_template_refuses_is_said_at_the_start(tiny_model, tmp_path, takes):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    if not takes:
        template = (folder / "chat_template.jinja").read_text()
        refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        (folder / "chat_template.jinja").write_text(refusal + template)
    served = Served("strict", load(m=folder)["m"], max_batch=1, cache_tokens=64)
    _check_policy(served, None)
    if takes:
        _check_policy(served, Policy(system="12"))
    else:
        with pytest.raises(UserError, match=r"^--policy: .* strict .*no system role"):
            _check_policy(served, Policy(system="12"))
