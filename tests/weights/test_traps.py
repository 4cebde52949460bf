"""The fifteen traps, one test each: the trap itself on a tiny model, that a folder in it is told so, and our way out.

What transformers does was run with the version installed; what other engines do was read in their sources.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

import farthing
from farthing.base.errors import UserError
from farthing.base.files import write_json
from farthing.model import Segments
from farthing.model.moe import Router, Routing, routers
from farthing.weights import decoder_config, load_decoder, save_decoder
from farthing.weights.check import check
from farthing.weights.export import export
from farthing.weights.folder import read_config, read_tensors
from farthing.weights.fp8 import Weights
from farthing.weights.traps import TRAPS, Facts, facts, failed_traps

Make = Callable[..., Path]


def told(folder: Path) -> set[int]:
    return {trap.number for trap, _ in failed_traps(facts(check(folder)))}


def sentence(number: int, config: dict[str, Any]) -> str:
    """What is said of a config that only a `Facts` can hold, as we refuse to write such a folder."""
    return {trap.number: said for trap, said in failed_traps(Facts(config))}[number]


def change(folder: Path, **changed: Any) -> Path:
    config = read_config(folder) | changed
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not ...})
    return folder


def stock(folder: Path) -> tuple[Any, dict[str, Any]]:
    """transformers' model of a folder in float32, and what it says about the tensors."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    return model.eval(), report


def logits(model: Any, length: int = 60) -> Tensor:
    ids = torch.randint(0, 330, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids)
    scores: Tensor = out if isinstance(out, Tensor) else out.logits
    return scores[0]


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_decoder(folder)
    return str(caught.value)


def test_trap_01_keys_that_transformers_leaves_out(make_folder: Make, tmp_path: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(make_folder(num_nextn_predict_layers=0))
    plain = {
        name: getattr(config, name) for name in transformers.DeepseekV3Config().to_dict() if name != "dtype"
    }
    model = transformers.AutoModelForCausalLM.from_config(transformers.DeepseekV3Config(**plain))
    model.save_pretrained(tmp_path / "theirs")
    theirs = read_config(tmp_path / "theirs")
    lost = {"scoring_func", "topk_method", "moe_layer_freq"}
    assert not lost & theirs.keys(), "the trap: transformers writes none of them"
    assert 1 in told(tmp_path / "theirs")

    ours = save_decoder(load_decoder(tmp_path / "theirs"), theirs, tmp_path / "ours", None)
    written = read_config(ours)
    assert (written["scoring_func"], written["topk_method"], written["moe_layer_freq"]) == (
        "sigmoid",
        "noaux_tc",
        1,
    )
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 10_000.0
    assert written["rope_scaling"]["type"] == written["rope_parameters"]["rope_type"] == "yarn"
    assert 1 not in told(ours)


def test_trap_02_epsilon_of_the_latents_norms(make_folder: Make) -> None:
    folder = make_folder(rms_norm_eps=1e-2)
    theirs, _ = stock(folder)
    layer = theirs.model.layers[0]
    assert layer.input_layernorm.variance_epsilon == 1e-2
    assert layer.self_attn.kv_a_layernorm.variance_epsilon == 1e-6, "the trap: two epsilons from one key"
    assert 2 in told(folder)

    ours = load_decoder(folder, torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)
    ours.layers[0].attention.kv_norm.eps = 1e-2
    assert (logits(ours) - logits(theirs)).abs().max() > 1e-2, "it is no small matter"
    assert 2 not in told(change(folder, rms_norm_eps=1e-6))


def router_pair(bias: Tensor) -> tuple[Router, Any]:
    """Our router and transformers', of 8 experts in 4 groups, 2 groups and 3 experts a token, with equal weights."""
    sizes = {
        "hidden_size": 16,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
    }
    rest = {"intermediate_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 9, "kv_lora_rank": 4, "q_lora_rank": None,
            "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}  # fmt: skip
    config = transformers.DeepseekV3Config(**sizes, **rest)
    theirs = DeepseekV3TopkRouter(config)
    theirs.weight.data = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    theirs.e_score_correction_bias.copy_(bias)
    ours = Router(decoder_config(config.to_dict()), 0)
    ours.weight.data.copy_(theirs.weight)
    assert ours.bias is not None
    ours.bias.data.copy_(bias)
    return ours, theirs


def test_trap_03_masked_groups(make_folder: Make) -> None:
    bias = torch.full((8,), -2.0)  # every corrected score is below 0
    ours, theirs = router_pair(bias)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    corrected = (x @ ours.weight.T).sigmoid() + bias
    groups = corrected.view(50, 4, 2)
    kept = groups.sum(-1).topk(2).indices
    inside = torch.zeros(50, 4, dtype=torch.bool).scatter_(1, kept, True).repeat_interleave(2, 1)
    with_zero = corrected.masked_fill(~inside, 0.0).topk(3).indices
    assert not inside.gather(1, with_zero).any(), "the trap: with 0 all choices come from masked groups"

    _, chosen = ours(x, None)
    assert inside.gather(1, chosen).all()
    assert torch.equal(chosen.sort().values, theirs(x)[2].sort().values)

    folder = make_folder()
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for value, expected in ((-0.1, True), (0.1, False)):
        for key in tensors:
            if key.endswith("e_score_correction_bias"):
                tensors[key] = torch.full_like(tensors[key], 0.2)
        tensors[name] = torch.full_like(tensors[name], value)
        save_file(tensors, folder / "model.safetensors")
        assert (3 in told(folder)) == expected


def test_trap_04_groups_of_one_expert(make_folder: Make) -> None:
    folder = make_folder(num_nextn_predict_layers=0)
    change(folder, n_group=8, topk_group=4)
    theirs, _ = stock(folder)
    with pytest.raises(RuntimeError, match="out of range"):  # the trap
        logits(theirs)
    message = refused(folder)
    assert "n_group" in message
    assert "fewer groups" in message
    assert "best two" in sentence(4, read_config(folder))


def test_trap_05_order_of_rotated_rows(make_folder: Make) -> None:
    folder = make_folder(rope_scaling=None)
    right = logits(stock(folder)[0])
    torch.testing.assert_close(logits(load_decoder(folder, torch.float32)), right, atol=1e-4, rtol=0)
    change(folder, rope_interleave=False)
    other = logits(stock(folder)[0])
    torch.testing.assert_close(other[0], right[0], atol=1e-4, rtol=0)  # position 0 is not rotated
    assert (other[1:] - right[1:]).abs().max() > 0.1, "the trap: the same folder, another model"
    assert "rope_interleave" in refused(folder)
    assert "only transformers" in sentence(5, read_config(folder))


def test_trap_06_yarns_factor_m_squared(make_folder: Make) -> None:
    folder = make_folder("deepseek_v2", rope_scaling=make_yarn(mscale=0.707, mscale_all_dim=0.707))
    assert 6 in told(folder)
    ours = load_decoder(folder, torch.float32)
    right = logits(stock(folder)[0])
    torch.testing.assert_close(logits(ours), right, atol=1e-4, rtol=0)
    assert ours.config.rope.score_scale == pytest.approx(1.590, abs=1e-3), "as in DeepSeek-V2-Lite"
    for layer in ours.layers:
        layer.attention.score_scale = 1.0
    without = logits(ours)
    torch.testing.assert_close(without[0], right[0], atol=1e-4, rtol=0)
    assert (without[1:] - right[1:]).abs().max() > 0.05, "the trap: later positions drift"


def make_yarn(**scales: float) -> dict[str, Any]:
    return {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32, **scales}


def test_trap_07_number_of_key_value_heads(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder()
    hf = read_config(folder)
    change(folder, num_key_value_heads=2)
    with pytest.raises(
        RuntimeError
    ):  # the trap: keys come from one latent for all heads, and are repeated again
        logits(stock(folder)[0])
    assert "num_key_value_heads" in refused(folder)
    assert "repeated" in sentence(7, read_config(folder))

    change(folder, num_key_value_heads=...)
    again = save_decoder(load_decoder(folder), {**hf, "num_key_value_heads": None}, tmp_path / "again", None)
    assert read_config(again)["num_key_value_heads"] == hf["num_attention_heads"]


def test_trap_08_biases_and_activations(make_folder: Make) -> None:
    folder = make_folder()
    with_biases = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(change(folder, attention_bias=True))
    )
    biases = {name.split(".")[4] for name, _ in with_biases.named_parameters() if name.endswith("_proj.bias")}
    biases |= {name.split(".")[4] for name, _ in with_biases.named_parameters() if name.endswith("mqa.bias")}
    assert {"kv_a_proj_with_mqa", "o_proj"} <= biases, "the trap: tensors that vLLM has no place for"
    assert "attention_bias" in refused(folder)
    assert "without a bias" in sentence(8, read_config(folder))
    assert "gelu" in sentence(8, read_config(folder) | {"attention_bias": False, "hidden_act": "gelu"})
    assert "hidden_act" in refused(change(folder, attention_bias=False, hidden_act="gelu"))


def test_trap_09_prediction_modules(make_folder: Make) -> None:
    folder = make_folder()
    theirs, report = stock(folder)
    assert not report["missing_keys"]
    assert report["unexpected_keys"], "the trap"
    assert all(name.startswith("model.layers.3.") for name in report["unexpected_keys"])
    assert 9 in told(folder)
    assert 9 not in told(make_folder(name="without", num_nextn_predict_layers=0))

    ours = load_decoder(folder, torch.float32)
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=0)
    assert len(ours.mtp) == 1
    model = farthing.load(str(folder), dtype=torch.float32)
    again = dict(read_tensors(model.save(folder.parent / "again")))
    before = dict(read_tensors(folder))
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


def test_trap_10_latents_expanded_at_each_token(make_folder: Make) -> None:
    folder = make_folder(num_nextn_predict_layers=0)
    rows: list[int] = []

    def count(module: Any, given: Any, _: Any) -> None:
        rows.append(given[0].numel() // given[0].shape[-1])

    theirs, _ = stock(folder)
    theirs.model.layers[1].self_attn.kv_b_proj.register_forward_hook(count)
    ids = torch.arange(20, 60)[None]
    theirs.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert rows == [40, 41, 42, 43], "the trap: the whole history again for each new token"
    assert 10 in told(folder)

    rows.clear()
    model = farthing.load(str(folder), dtype=torch.float32)
    model.decoder.layers[1].attention.kv_b.register_forward_hook(count)
    model.generate("State the final answer: 12 + 34 = 46.", max_new_tokens=4, temperature=0.0)
    assert len(rows) == 1, "only the prompt is expanded"


def test_trap_11_precision_of_the_router() -> None:
    ours, _ = router_pair(torch.zeros(8))
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours.weight.data = ours.weight.data.bfloat16().float()
    _, exact = ours(x.float(), None)
    in_bf16 = copy.deepcopy(ours).bfloat16()
    _, chosen = in_bf16(x, None)
    assert torch.equal(chosen, exact), "the network may be in bfloat16, the router never is"

    scores = (x @ ours.weight.bfloat16().T).sigmoid()
    rounded = copy.copy(ours)._choose(scores)
    flipped = (rounded.sort().values != exact.sort().values).any(-1).float().mean()
    assert flipped > 0.001, "the trap: near-ties flip"
    routing = Routing(replay={0: rounded})
    assert torch.equal(ours(x.float(), routing)[1], rounded), "and can be replayed where they must agree"
    assert [trap.number for trap in TRAPS if trap.check is None] == [11]


def test_trap_12_a_tokenizer_without_a_name(make_folder: Make, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = make_folder()
    assert 12 not in told(folder)
    export(folder, "gguf", tmp_path / "m.gguf")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {"blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"} <= names
    assert not any("attn_kv_b" in name for name in names), "the old layout, which cannot run absorbed"

    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["pretokenizers"][0] = {"type": "Punctuation", "behavior": "Isolated"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert 12 in told(folder)
    with pytest.raises(UserError, match="no name for"):  # the trap, before a single tensor is written
        export(folder, "gguf", tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()


def test_trap_13_a_correction_that_is_not_read(make_folder: Make) -> None:
    folder = make_folder()
    assert 13 in told(folder), "DeepSeek's demo has the correction only at hidden_size 7168"
    decoder = load_decoder(folder, torch.float32)
    right = logits(decoder)
    for router in routers(decoder):
        assert router.bias is not None
        assert router.bias.abs().max() > 0
        router.bias.data.zero_()
    assert (logits(decoder) - right).abs().max() > 0.1, "without it other experts are chosen"

    ours, _ = router_pair(torch.zeros(8))
    ours.weight.data.fill_(1.0)
    gates, _ = ours(torch.full((1, 16), -1e4), None)
    assert torch.equal(gates, torch.zeros_like(gates)), "scores that are all 0 divide to 0, not to NaN"


def test_trap_14_fp8_without_a_gpu(make_folder: Make, tmp_path: Path) -> None:
    folder = make_folder(num_nextn_predict_layers=0)
    export(folder, "hf-fp8", tmp_path / "fp8")
    assert 14 in told(tmp_path / "fp8")
    assert 14 not in told(folder)
    theirs = stock(tmp_path / "fp8")[0].state_dict()
    meant = Weights(tmp_path / "fp8")
    assert torch.equal(
        theirs["model.layers.0.mlp.up_proj.weight"], meant["model.layers.0.mlp.up_proj.weight"]
    )
    down = theirs["model.layers.2.mlp.experts.down_proj"]
    for number in range(8):
        assert torch.equal(down[number], meant[f"model.layers.2.mlp.experts.{number}.down_proj.weight"])

    kv_b = "model.layers.1.self_attn.kv_b_proj.weight"  # 160 rows: a block of 128, and one of 32
    wrong = (theirs[kv_b] != meant[kv_b]).any(dim=1).nonzero().flatten()
    assert wrong.tolist() == list(range(80, 128)), "the trap: two blocks of 80 are read"
    [said] = [said for trap, said in failed_traps(facts(check(tmp_path / "fp8"))) if trap.number == 14]
    assert "kv_b_proj.weight in blocks that are not 128 x 128" in said
    before = dict(read_tensors(folder))[kv_b]
    assert (meant[kv_b] - before).abs().max() < 2**-4 * before.abs().max()
    assert logits(load_decoder(tmp_path / "fp8", torch.float32)).isfinite().all()
    export(tmp_path / "fp8", "hf-bf16", tmp_path / "bf16")
    assert 14 not in told(tmp_path / "bf16")
    assert {t.dtype for n, t in read_tensors(tmp_path / "bf16") if "bias" not in n} == {torch.bfloat16}


def test_trap_15_a_balance_loss_that_vanishes(make_folder: Make, tmp_path: Path) -> None:
    model, _ = stock(make_folder(num_nextn_predict_layers=0))
    model.save_pretrained(tmp_path / "theirs")
    assert "aux_loss_alpha" not in read_config(tmp_path / "theirs"), "the trap"
    assert 15 in told(tmp_path / "theirs")

    decoder = load_decoder(tmp_path / "theirs", torch.float32)
    routing = Routing(lengths=[30, 30], balance=1e-3)
    positions = torch.arange(30).repeat(2)
    decoder.hidden(torch.arange(60), positions, Segments([(30, []), (30, [])]), routing)
    assert routing.loss is not None
    assert routing.loss.item() >= 1e-3 * 2 * 0.99, "two layers, each at least alpha when perfectly balanced"
    routing.loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in routers(decoder))


def test_the_list_has_fifteen_and_each_has_its_test() -> None:
    assert [trap.number for trap in TRAPS] == list(range(1, 16))
    written = [name for name in globals() if name.startswith("test_trap_")]
    assert sorted(int(name.split("_")[2]) for name in written) == list(range(1, 16))


def test_a_folder_of_ours_and_a_plain_one(make_folder: Make) -> None:
    """What remains for ours is what the others do whatever a folder says."""
    folder = make_folder(aux_loss_alpha=1e-4, num_nextn_predict_layers=0)
    assert told(folder) <= {3, 10, 13}
    assert told(make_folder("llama", name="plain")) == set()
    assert replace(facts(check(folder)), least_bias=None).gated
