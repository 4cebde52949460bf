"""The user-facing model: generate, chat, stream, save."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import farthing
from farthing.base.device import choose
from farthing.base.errors import UserError
from farthing.engine import Completion, Model
from farthing.engine import model as engine_model

ASK = [{"role": "user", "content": "State the final answer to the following arithmetic problem: 3 + 4 ="}]
PLAIN = "<|user|>State the final answer to the following arithmetic problem: {} ="


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return farthing.load(tiny_model)


def scores(model: Model, prompt: list[int], ids: list[int]) -> list[float]:
    logits = model.logits(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
    return [float(row[token]) for row, token in zip(logits.log_softmax(-1), ids, strict=True)]


def test_logits_cover_every_vocabulary_entry(model: Model) -> None:
    logits = model.logits(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert logits.shape == (2, 3, 304)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad


def test_chat_answers_with_a_number_and_its_log_probabilities(model: Model) -> None:
    answer = model.chat(ASK, temperature=0, max_new_tokens=8)
    assert isinstance(answer, farthing.Completion)
    assert int(answer.text) in range(-9, 19)
    assert answer.finish_reason == "stop"
    assert answer.ids[-1] == 0  # <|end|> is in the ids but not in the text
    assert answer.text == model.tokenizer.decode(answer.ids[:-1])
    expected = scores(model, model.tokenizer.chat_ids(ASK), answer.ids)
    assert answer.logprobs == pytest.approx(expected, abs=0.05)
    assert model.chat(ASK, temperature=0, max_new_tokens=1).finish_reason == "length"


def test_streamed_pieces_add_up_to_the_answer(model: Model) -> None:
    for seed in range(5):
        options = {"temperature": 2.0, "max_new_tokens": 12, "seed": seed}
        pieces = list(model.stream(ASK, **options))
        assert "".join(pieces) == model.chat(ASK, **options).text
        assert all(pieces)


def test_generate_takes_one_text_or_many(model: Model) -> None:
    texts = [PLAIN.format(sum_) + "<|assistant|>" for sum_ in ("1 + 1", "2 + 2", "9 - 4")]
    together = model.generate(texts, temperature=0, max_new_tokens=5)
    alone = [model.generate(text, temperature=0, max_new_tokens=5) for text in texts]
    assert [c.ids for c in together] == [c.ids for (c,) in alone]
    assert model.generate([]) == []
    same = model.generate([texts[0]] * 8, temperature=1.5, max_new_tokens=5)
    assert len({tuple(c.ids) for c in same}) > 1  # equal prompts do not share draws


def test_seeds(model: Model) -> None:
    def answers(**seed: int | None) -> list[list[int]]:
        return [c.ids for c in model.generate([PLAIN] * 4, temperature=2.0, max_new_tokens=12, **seed)]

    assert answers(seed=1) == answers(seed=1)
    assert answers(seed=1) != answers(seed=2)
    assert answers() == answers()  # the default seed is 0
    assert len({str(answers(seed=None)) for _ in range(4)}) > 1  # two of these short answers may be equal
    draws = {"temperature": 2.0, "max_new_tokens": 12, "seed": None}
    assert len({tuple(model.chat(ASK, **draws).ids) for _ in range(3)}) > 1
    assert len({"".join(model.stream(ASK, **draws)) for _ in range(4)}) > 1


@pytest.mark.parametrize("form", [tuple, list, "".join])
@pytest.mark.parametrize("length", [1, 3, 7])
def test_a_stop_string_ends_the_answer_and_is_removed(
    model: Model, form: Callable[[list[str]], Any], length: int
) -> None:
    for seed in range(300):  # sampled text at this temperature may differ between machines
        babble = {"temperature": 4.0, "max_new_tokens": 40, "seed": seed}
        whole = model.chat(ASK, **babble)
        parts = {at: whole.text[at : at + length] for at in range(4, len(whole.text) - length - 6)}
        firsts = [at for at, part in parts.items() if part.isascii() and whole.text.find(part) == at]
        if firsts:
            break
    at, stop = firsts[0], parts[firsts[0]]
    cut = model.chat(ASK, stop=form([stop]), **babble)
    assert cut.text == whole.text[:at]
    assert cut.ids == whole.ids[: len(cut.ids)]
    assert len(cut.ids) < len(whole.ids)
    assert cut.finish_reason == "stop"
    assert "".join(model.stream(ASK, stop=form([stop]), **babble)) == cut.text
    absent = whole.text[1] + "@#$%&"  # its first letter occurs, the whole does not
    assert model.chat(ASK, stop=form([absent]), **babble).text == whole.text
    pieces = list(model.stream(ASK, stop=form([absent]), **babble))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 3
    (generated,) = model.generate(PLAIN, stop=form([whole.text[0]]), **babble)
    assert generated.text == model.generate(PLAIN, **babble)[0].text.partition(whole.text[0])[0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temprature": 1}, "temprature.*sampling accepts .*temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"stop": ("",)}, "stop string is empty"),
        ({"temperature": "hot"}, "hot|str"),
    ],
)
def test_a_wrong_sampling_value_is_named(model: Model, wrong: dict[str, Any], message: str) -> None:
    for call in (
        lambda: model.generate("1", **wrong),
        lambda: model.chat(ASK, **wrong),
        lambda: list(model.stream(ASK, **wrong)),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_prompts_that_cannot_be_answered_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match="empty"):
        model.generate("")
    with pytest.raises(UserError, match="cache"):
        model.generate("1" * 40_000)


def test_a_saved_model_is_the_same_model(model: Model, tmp_path: Path) -> None:
    folder = model.save(tmp_path / "copy")
    assert folder == tmp_path / "copy"
    again = farthing.load(str(folder))
    for one, two in zip(model.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert torch.equal(one, two)
    options = {"temperature": 1.0, "max_new_tokens": 12, "seed": 3}
    # loaded anew, because a cached prompt rounds differently
    answer = farthing.load(model.folder).chat(ASK, **options)
    assert again.chat(ASK, **options) == answer
    assert again.save(folder) == folder  # in place
    assert farthing.load(folder).chat(ASK, **options) == answer


def test_changed_weights_affect_the_next_answer(tiny_model: Path) -> None:
    model = farthing.load(tiny_model, dtype="float32")
    before = model.chat(ASK, temperature=0, max_new_tokens=4)
    with torch.no_grad():
        model.decoder.embed.weight.mul_(-1.0)
    after = model.chat(ASK, temperature=0, max_new_tokens=4)
    assert isinstance(after, Completion)
    assert after.ids != before.ids


def test_changed_weights_invalidate_a_cached_prompt(tiny_model: Path) -> None:
    model, long = farthing.load(tiny_model), PLAIN.format("1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + 1")
    options = {"temperature": 0, "max_new_tokens": 4}
    model.generate(long, **options)
    with torch.no_grad():
        model.decoder.layers[0].feedforward.down.weight.mul_(-2.0)
    changed = model.generate(long, **options)[0].logprobs
    expected = Model(tiny_model, choose().torch_dtype)
    expected.decoder.load_state_dict(model.decoder.state_dict())
    assert changed == pytest.approx(expected.generate(long, **options)[0].logprobs, abs=1e-6)


@pytest.mark.parametrize(("dtype", "expected"), [("float32", torch.float32), (torch.float32, torch.float32)])
def test_dtypes(tiny_model: Path, dtype: str | torch.dtype, expected: torch.dtype) -> None:
    assert farthing.load(tiny_model).decoder.embed.weight.dtype == choose().torch_dtype
    assert farthing.load(tiny_model, dtype=dtype).decoder.embed.weight.dtype == expected
    with pytest.raises(UserError, match="dtype: must be auto, bfloat16 or float32, got 'int8'"):
        farthing.load(tiny_model, dtype="int8")


def test_devices(tiny_model: Path) -> None:
    assert farthing.load(tiny_model, device=torch.device("cpu")).decoder.embed.weight.device.type == "cpu"
    for device in (None, 0, "tpu"):
        with pytest.raises(UserError, match="device: must be auto, cpu, cuda or cuda:N"):
            farthing.load(tiny_model, device=device)  # type: ignore[arg-type]


def test_weights_created_in_inference_mode_generate(tiny_model: Path) -> None:
    with torch.inference_mode():
        model = farthing.load(tiny_model, device="cpu")
    assert model.chat(ASK, temperature=0, max_new_tokens=3).ids


def test_the_cache_shrinks_with_free_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = farthing.load(tiny_model, device="cpu")
    # keys and values, layers, heads, width
    token_bytes = 2 * 2 * 2 * 16 * model.decoder.embed.weight.element_size()
    monkeypatch.setattr(engine_model, "free_memory", lambda _: 2 * 3000 * token_bytes)
    with pytest.raises(UserError, match="the cache holds 3008"):  # 3000 tokens, rounded up to whole pages
        model.chat(ASK, max_new_tokens=4000)
    assert model.chat(ASK, max_new_tokens=3).ids


def test_the_cache_grows_for_a_long_prompt_and_a_stream_keeps_its_own(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 3000}))
    monkeypatch.setattr(engine_model, "_CACHE", 1024)
    model = farthing.load(folder, device="cpu", dtype="float32")
    wanted = model.chat(ASK, temperature=0, max_new_tokens=8).text
    stream = model.stream(ASK, temperature=0, max_new_tokens=8)
    pieces = [next(stream)]
    prompt = "1 + " * 350
    length = len(model.tokenizer.encode(prompt))
    assert length > 1024
    (answer,) = model.generate(prompt, temperature=0, max_new_tokens=5)
    assert answer.logprobs == pytest.approx(
        scores(model, model.tokenizer.encode(prompt), answer.ids), abs=1e-3
    )
    assert "".join([*pieces, *stream]) == wanted
    with pytest.raises(UserError, match="the cache holds 3008"):
        model.generate(prompt, max_new_tokens=3000)


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        farthing.load(tmp_path / "nowhere")


@pytest.mark.parametrize("folder", ["", "a\0b", "\ud800", "x" * 300, None, 3])
def test_a_model_is_saved_only_under_a_name_that_a_folder_can_have(
    model: Model, folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        model.save(folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["max_batch", "cache_tokens", "speculate", "record_routing"])
@pytest.mark.parametrize("value", [None, "x", 1.5, -1, [1]])
def test_an_engine_takes_only_whole_numbers(model: Model, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=key):
        model.engine(**{key: value})


def test_the_context_is_the_models_positions_or_what_memory_has_room_for(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = farthing.load(tiny_model)
    positions = model.decoder.config.max_positions
    assert model.context == positions
    monkeypatch.setattr(model, "affordable", lambda tokens: min(tokens, 100))
    assert model.context == 100
    model.chat(ASK, max_new_tokens=2)
    assert model.context == model._own_engine().capacity < positions
    with pytest.raises(UserError):  # what it says is what there is
        model.chat(ASK, max_new_tokens=model.context)


def test_work_is_counted_until_it_is_asked_for(tiny_model: Path) -> None:
    model = farthing.load(tiny_model)
    assert model.done().new_tokens == 0
    answer = model.chat(ASK, max_new_tokens=4)
    assert model.done().new_tokens == len(answer.ids)
    assert model.done().new_tokens == 0
