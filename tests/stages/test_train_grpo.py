"""The GRPO stage as a whole, on a model of 100k parameters that can do some sums."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import farthing.train.grpo
from farthing.base.device import Alone
from farthing.base.errors import UserError
from farthing.cost.meter import Meter
from farthing.data.overlap import HeldOut
from farthing.engine import Engine, Model
from farthing.engine.sampling import Chosen
from farthing.recipe import Grpo
from farthing.stages.grpo import train_grpo
from farthing.tasks.pool import VerifierPool
from farthing.train.alarms import NothingToLearn
from farthing.train.loop import Diverged, Progress
from farthing.weights import load_decoder

Make = Callable[..., Grpo]
Train = Callable[..., tuple[Model, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def pool() -> Iterator[VerifierPool]:
    with VerifierPool(workers=1) as pool:
        yield pool


@pytest.fixture
def train(tiny_model: Path, pool: VerifierPool, meter: Meter, make_stage: Make, tmp_path: Path) -> Train:
    """A function that trains: gives the model and the metrics. `stop_at` cuts the power after that step's
    metrics."""

    def run(
        name: str = "run",
        dtype: torch.dtype = torch.bfloat16,
        stop_at: int | None = None,
        say: Callable[[str], None] = print,
        **settings: Any,
    ) -> tuple[Model, list[dict[str, Any]]]:
        model = Model(tiny_model, dtype=dtype)

        def watch(line: dict[str, Any]) -> None:
            if line["step"] == stop_at:
                raise KeyboardInterrupt

        train_grpo(
            make_stage(**{"prompts": 4, "group": 8} | settings),  # so many that hardly a step is silent
            model,
            tmp_path / name,
            seed=3,
            held_out=HeldOut(),
            pool=pool,
            meter=meter,
            ranks=Alone("cpu"),
            progress=Progress(watch, watch, warn=say),
        )
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return model, [json.loads(line) for line in lines]

    return run


def changed(model: Model, base: Path) -> dict[str, bool]:
    dtype = model.decoder.embed.weight.dtype
    before = dict(load_decoder(base, dtype=dtype).named_parameters())
    return {n: not torch.equal(p, before[n]) for n, p in model.decoder.named_parameters() if n in before}


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_a_stage_trains_and_the_sampler_is_the_trainer(
    train: Train, tiny_model: Path, dtype: torch.dtype, largest: float
) -> None:
    model, metrics = train(dtype=dtype, steps=5)
    moved = changed(model, tiny_model)
    assert all(
        yes for name, yes in moved.items() if "norm" not in name
    )  # bfloat16's norms near 1 need larger steps
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    proved = [line["sync_max"] for line in metrics if line["sync_max"] is not None]
    assert len(proved) >= 2, "hardly any batch had signal; the test shows nothing"
    assert max(proved) < largest
    assert sum(line["right"] for line in metrics) > 0
    for line in metrics:
        assert line["kl"] is None
        assert line["seconds"] == pytest.approx(sum(line["seconds_by_activity"].values()), abs=0.05)
        assert line["lr"] == 1e-3


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "muon, two updates, refill": {"optimizer": "muon", "updates": 2, "refill": 2},
    "kl, sample": {"kl": 0.1, "loss": "sample", "schedule": "cosine", "warmup": 1},
    "lora": {"lora": 4, "mask_truncated": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_stage_that_died_ends_with_the_same_weights(train: Train, name: str) -> None:
    settings = {"steps": 6, **SETTINGS[name]}
    whole, metrics = train("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train("died", stop_at=4, **settings)  # with step 4 done but not in a checkpoint
    with pytest.raises(KeyboardInterrupt):
        train("died", stop_at=5, **settings)
    died, again = train("died", **settings)
    for one, two in zip(whole.decoder.parameters(), died.decoder.parameters(), strict=True):
        assert torch.equal(one, two)
    varying = {"seconds", "seconds_by_activity", "tokens_per_second", "usd_so_far"}
    assert [{k: v for k, v in line.items() if k not in varying} for line in again] == [
        {k: v for k, v in line.items() if k not in varying} for line in metrics
    ]


def test_the_divergence_is_measured_from_the_stages_start(train: Train) -> None:
    _, metrics = train(kl=0.1, dtype=torch.float32, steps=6)
    measured = [line["kl"] for line in metrics if line["grad_norm"] is not None]
    assert len(measured) >= 2
    assert measured[0] == pytest.approx(0, abs=1e-6)
    assert measured[-1] > 1e-5


# ---- nothing to learn ----

UNREADABLE = {"answer": "boxed", "stop_silent": 4, "steps": 20}  # the tiny model never writes a box


def test_a_stage_that_learns_nothing_says_why_and_stops_before_the_next_step(
    train: Train, tmp_path: Path, tiny_model: Path
) -> None:
    said: list[str] = []
    with pytest.raises(NothingToLearn, match=r"none of the first 4 steps .* can be read: .*\(answer\)"):
        train(say=said.append, **UNREADABLE)
    assert len(said) == 1
    assert "none of the first 3 steps" in said[0]
    path = tmp_path / "run" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4]
    said.clear()
    with pytest.raises(NothingToLearn, match="none of the first 4 steps"):  # at once, and without a step
        train(say=said.append, **UNREADABLE)
    assert said == []
    model, lines = train(say=said.append, **UNREADABLE | {"stop_silent": None, "steps": 6})
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["signal"] == 0 and line["silent"] == 1 and line["grad_norm"] is None for line in lines)
    assert not any(changed(model, tiny_model).values())


def test_a_stage_that_learns_is_left_alone(train: Train) -> None:
    said: list[str] = []
    _, lines = train(say=said.append, stop_silent=1, steps=4)
    assert said == []
    assert lines[0]["signal"] > 0
    for line in lines:
        silent = line["silent"] * line["groups_sampled"]
        assert line["groups_kept"] == pytest.approx(line["groups_sampled"] - silent)


# ---- LoRA ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_trains_adapters_alone_and_is_merged_on_export(
    train: Train, tiny_model: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    model, metrics = train(lora=4, dtype=dtype, lr=1e-2, steps=5)
    assert not any(changed(model, tiny_model).values())
    adapters = {n: p for n, p in model.decoder.named_parameters() if ".lora." in n}
    assert len(adapters) == 2 * 4 * 2  # down and up, for qkv, o, gate_up and down of two layers
    assert all(float(p.detach().abs().max()) > 0 for n, p in adapters.items() if n.endswith("up"))
    assert max(line["sync_mean"] or 0 for line in metrics) < (1e-4 if dtype == torch.float32 else 0.1)

    ids = torch.tensor([model.tokenizer.encode("<|user|>State the final answer: 3 + 4 =<|assistant|>")])
    merged = Model(model.save(tmp_path / "saved"), dtype=dtype)
    assert not any(".lora." in name for name, _ in merged.decoder.named_parameters())
    base = Model(tiny_model, dtype=dtype).logits(ids)
    got, expected = merged.logits(ids), model.logits(ids)
    moved = float((expected - base).norm())
    assert moved > 0.05 * float(base.norm())
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    assert float((got - expected).norm()) < tolerance * moved


# ---- the sync proof, end to end ----


def test_log_probabilities_that_are_tampered_with_stop_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Engine._append

    def shifted(self: Engine, sequences: Any, chosen: Chosen) -> list[int]:
        return real(self, sequences, replace(chosen, logprobs=[x + 0.2 for x in chosen.logprobs]))

    monkeypatch.setattr(Engine, "_append", shifted)
    with pytest.raises(Diverged, match=r"disagree .* by 0\.\d+ nats .*sync_tolerance 0\.1"):
        train(lora=None)


@pytest.mark.parametrize("lora", [None, 4])
def test_a_sampler_with_other_weights_stops_the_run(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lora: int | None
) -> None:
    def stale(model: Model, *sizes: int, **more: int) -> Engine:
        twin = copy.deepcopy(model.decoder)
        with torch.no_grad():
            twin.get_parameter("layers.0.feedforward.down.weight").mul_(0.2)
        return Engine(twin, model.tokenizer.stop_ids, decode=model.tokenizer.decode)

    with monkeypatch.context() as patched:
        patched.setattr(Model, "engine", stale)
        with pytest.raises(Diverged, match="sync_tolerance"):
            train("stale", lora=lora)
    assert not list((tmp_path / "stale").glob("state/step-*"))
    train("fresh", lora=lora)  # with its own weights it runs through


# ---- numbers that cannot be trained on ----


def test_a_nan_in_the_loss_stops_with_the_last_weights_kept(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, steps_seen = farthing.train.grpo.clipped_objective, []

    def breaks(*arguments: Any) -> Any:
        objective, held = real(*arguments)
        steps_seen.append(1)
        return objective * (float("nan") if len(steps_seen) == 3 else 1.0), held

    monkeypatch.setattr(farthing.train.grpo, "clipped_objective", breaks)
    with pytest.raises(Diverged, match="the gradient is nan") as said:
        train(steps=20, drop_silent=False, checkpoint_every=1)
    kept = sorted((tmp_path / "run" / "state").iterdir())
    assert f"step {int(kept[-1].name[5:])} are kept in {tmp_path / 'run' / 'state'}" in str(said.value)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == int(kept[-1].name[5:])
    assert all(torch.isfinite(torch.tensor(json.loads(line)["grad_norm"] or 0.0)) for line in lines)


def test_an_exploding_gradient_stops_the_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the gradient's norm is \d+\.\d, above max_grad_norm 0\.001"):
        train(max_grad_norm=1e-3)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["grad_norm"] is None for line in lines)


# ---- questions of one's own ----


@pytest.mark.parametrize("too_long", [3, 40])
def test_questions_without_room_for_an_answer_are_skipped_and_said(
    tiny_model: Path, pool: VerifierPool, meter: Meter, make_stage: Make, tmp_path: Path, too_long: int
) -> None:
    rows = [
        {"question": f"State the final answer: {n % 10} + {n // 10} =", "answer": f"{n % 10 + n // 10}"}
        for n in range(40)
    ]
    for row in rows[:too_long]:
        row["question"] = "so very many " * 400 + row["question"]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    warned: list[str] = []
    stage = make_stage(tasks={"own": {"path": str(tmp_path / "own.jsonl")}}, steps=12, prompts=4, group=2)
    model = Model(tiny_model, dtype=torch.float32)

    def train() -> None:
        train_grpo(
            stage, model, tmp_path / "run", seed=3, held_out=HeldOut(), pool=pool, meter=meter, ranks=Alone("cpu"),
            progress=Progress(warn=warned.append),
        )  # fmt: skip

    if too_long == len(rows):
        with pytest.raises(UserError, match="tasks: own: hardly any question leaves room for an answer"):
            train()
    else:
        train()
        lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
        assert 48 + too_long <= lines[-1]["cursor"] <= 48 + 2 * too_long  # an epoch and a part of the next
    assert len([line for line in warned if "such questions are skipped" in line]) == 1
