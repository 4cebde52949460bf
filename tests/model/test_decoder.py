"""The decoder against transformers: equal random weights must give equal logits and gradients."""

import pytest
import torch
import transformers
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from farthing.model import Decoder, Segments
from farthing.model.kernels import segments
from farthing.weights import decoder_config, load_decoder, save_decoder

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip

FAMILIES = {
    "llama2-mha": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4),
    "llama3-rope": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, rope_parameters=LLAMA3),
    "llama-linear-rope": LlamaConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    ),
    "smollm-tied": LlamaConfig(**SMALL, num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=True),
    "llama-biases": LlamaConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=1, attention_bias=True, mlp_bias=True
    ),
    "wide-heads": LlamaConfig(**SMALL, num_attention_heads=2, num_key_value_heads=2, head_dim=32),
    "mistral": MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, sliding_window=None),
    "qwen2": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2),
    "qwen2-tied": Qwen2Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
}  # fmt: skip


@pytest.fixture(params=FAMILIES, ids=list(FAMILIES))
def pair(request, tmp_path):
    """Return transformers' model, ours and the folder, with random parameters so that no norm or bias is a no-op."""
    torch.manual_seed(7)
    theirs = transformers.AutoModelForCausalLM.from_config(
        FAMILIES[request.param], attn_implementation="eager"
    )
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    theirs.save_pretrained(tmp_path / "folder")
    return theirs.eval(), load_decoder(tmp_path / "folder", dtype=torch.float32), tmp_path / "folder"


def test_logits_equal_transformers(pair):
    theirs, ours, _ = pair
    ids = torch.randint(0, 97, (2, 100))
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_gradients_equal_transformers(pair, tmp_path):
    theirs, ours, folder = pair
    ids = torch.randint(0, 97, (2, 33))
    for model, logits in ((theirs, theirs(ids).logits), (ours, ours(ids))):
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        assert model is not None
    with torch.no_grad():  # save the gradients as if they were weights, to get them under transformers' names
        for parameter in ours.parameters():
            parameter.copy_(parameter.grad)
    hf = transformers.AutoConfig.from_pretrained(folder).to_dict()
    save_decoder(ours, hf, tmp_path / "gradients", tokenizer_from=None)
    grads = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gradients", dtype=torch.float32)
    carried = dict(grads.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(carried[name], parameter.grad, atol=1e-4, rtol=0, msg=name)


def test_saved_folder_loads_in_transformers_with_no_key_left_over(pair, tmp_path):
    theirs, ours, folder = pair
    hf = transformers.AutoConfig.from_pretrained(folder).to_dict()
    save_decoder(ours, hf, tmp_path / "again", tokenizer_from=None)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for name, parameter in theirs.named_parameters():
        assert torch.equal(dict(again.named_parameters())[name], parameter), name


@pytest.mark.parametrize("dense", [0, 1024])
def test_samples_that_share_a_prompt_equal_separate_sequences(dense, monkeypatch):
    monkeypatch.setattr(segments, "DENSE_LENGTH", dense)
    torch.manual_seed(1)
    ours = Decoder(decoder_config(FAMILIES["smollm-tied"].to_dict()))
    ours.init_weights(seed=3, std=0.2)
    prompt, tails = torch.randint(0, 97, (7,)), [torch.randint(0, 97, (n,)) for n in (5, 1, 9)]
    tree = Segments([(7, [5, 1, 9]), (4, []), (7, [5])])
    ids = torch.cat([prompt, *tails, prompt[:4], prompt, tails[0]])
    out = ours.logits(ours.hidden(ids, tree.positions(), tree))
    start = 7
    for tail in tails:
        alone = ours(torch.cat([prompt, tail])[None])[0]
        torch.testing.assert_close(out[start : start + len(tail)], alone[7:], atol=2e-5, rtol=0)
        start += len(tail)
    torch.testing.assert_close(out[start : start + 4], ours(prompt[None, :4])[0], atol=2e-5, rtol=0)
    out.square().sum().backward()
    tree_grad = ours.embed.weight.grad.clone()
    ours.zero_grad()
    prompt_out = ours(prompt[None])[0]
    total = prompt_out.square().sum() * 2 + ours(prompt[None, :4])[0].square().sum()
    for tail in [*tails, tails[0]]:
        total = total + ours(torch.cat([prompt, tail])[None])[0, 7:].square().sum()
    total.backward()
    torch.testing.assert_close(tree_grad, ours.embed.weight.grad, atol=1e-2, rtol=1e-4)
