"""The loop every stage shares: checkpoints, going on after a death, and stopping before harm is done."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farthing.base.errors import UserError
from farthing.cost import ledger
from farthing.cost.meter import Meter
from farthing.train import checkpoint
from farthing.train.loop import Diverged, Progress, best_step, check_norm, train
from farthing.train.optim import MasterWeights

Step = Callable[[int], dict[str, Any]]


class Training:
    """A regression of eight weights, under the loop, in a folder."""

    def __init__(self, folder: Path, meter: Meter) -> None:
        self.folder, self.meter = folder, meter
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 2, bias=False)
        self.weights = MasterWeights(self.layer, "adamw", 0.1, (0.9, 0.95), 0.0)
        self.state = {"cursor": 0}
        self.seen: list[int] = []  # steps that were reported, of earlier attempts too
        self.done: list[int] = []  # steps that were computed
        self.loss_scale = 1.0
        self.limit = 100.0

    def step(self, number: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(number)
        x, y = torch.randn(8, 4, generator=draw), torch.randn(8, 2, generator=draw)
        ((self.layer(x) - y).square().mean() * self.loss_scale).backward()
        norm = self.weights.clip(1.0)
        check_norm(norm, self.limit)
        self.weights.step(0.1)
        self.state["cursor"] += 3
        self.done.append(number)
        return {"step": number + 1, "norm": norm}

    def go(self, steps: int, step: Step | None = None, every: int = 2) -> "Training":
        train(
            self.folder,
            steps,
            self.weights,
            self.state,
            step or self.step,
            meter=self.meter,
            checkpoint_every=every,
            progress=Progress(self._see, self._see),
        )
        return self

    def _see(self, line: dict[str, Any]) -> None:
        self.seen.append(line["step"])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


def dies_at(training: Training, last: int, how: Callable[[], None]) -> Step:
    def step(number: int) -> dict[str, Any]:
        if number == last:
            how()
        return training.step(number)

    return step


def power_cut() -> None:
    raise KeyboardInterrupt


def test_a_run_that_died_repeats_the_lost_steps_exactly(tmp_path: Path, meter: Meter) -> None:
    whole = Training(tmp_path / "whole", meter).go(8)
    assert whole.done == [*range(8)]
    assert whole.seen == [*range(1, 9)]
    died = Training(tmp_path / "died", meter)
    with pytest.raises(KeyboardInterrupt):
        died.go(8, dies_at(died, 5, power_cut))
    assert [line["step"] for line in died.lines()] == [1, 2, 3, 4, 5]
    assert checkpoint.newest_step(tmp_path / "died" / "state") == 4
    again = Training(tmp_path / "died", meter)
    again.go(8)
    assert again.done == [4, 5, 6, 7]
    assert again.seen == [1, 2, 3, 4, 5, 6, 7, 8]  # the view is shown the old steps too
    assert again.lines() == whole.lines()
    assert again.state == whole.state == {"cursor": 24}
    assert torch.equal(again.layer.weight, whole.layer.weight)
    over = Training(tmp_path / "died", meter).go(8)
    assert over.done == []
    assert torch.equal(over.layer.weight, whole.layer.weight)


def test_metrics_are_cut_back_to_what_the_checkpoint_covers(tmp_path: Path, meter: Meter) -> None:
    died = Training(tmp_path, meter)
    with pytest.raises(KeyboardInterrupt):
        died.go(8, dies_at(died, 3, power_cut))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "no')  # torn by the death
    again = Training(tmp_path, meter)
    with pytest.raises(KeyboardInterrupt):
        again.go(8, dies_at(again, 2, power_cut))
    assert [line["step"] for line in again.lines()] == [1, 2]
    assert [line["step"] for line in Training(tmp_path, meter).go(8).lines()] == [*range(1, 9)]


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path: Path, meter: Meter) -> None:
    whole = Training(tmp_path / "whole", meter).go(6)
    Training(tmp_path / "run", meter).go(4)
    (tmp_path / "run" / "state" / "step-000004" / "state.safetensors").write_bytes(b"")
    again = Training(tmp_path / "run", meter).go(6)
    assert again.done == [2, 3, 4, 5]
    assert again.lines() == whole.lines()
    assert torch.equal(again.layer.weight, whole.layer.weight)


@pytest.mark.parametrize(
    ("scale", "reason"),
    [(float("nan"), "the gradient is nan"), (float("inf"), "the gradient is"), (1e6, "max_grad_norm 100")],
)
def test_a_broken_gradient_stops_before_it_reaches_the_weights(
    tmp_path: Path, meter: Meter, scale: float, reason: str
) -> None:
    training = Training(tmp_path, meter)
    kept: list[torch.Tensor] = []

    def break_it() -> None:
        training.loss_scale = scale
        kept.append(training.layer.weight.detach().clone())

    with pytest.raises(Diverged, match=reason) as said:
        training.go(8, dies_at(training, 5, break_it))
    assert "step 6" in str(said.value)
    assert f"step 4 are kept in {tmp_path / 'state'}" in str(said.value)
    assert torch.equal(training.layer.weight, kept[0])
    assert torch.equal(training.weights.masters[0].copy, kept[0])
    assert [line["step"] for line in training.lines()] == [1, 2, 3, 4, 5]
    found = checkpoint.latest(tmp_path / "state")
    assert found is not None
    assert found[0] == 4
    assert Training(tmp_path, meter).go(8).done == [4, 5, 6, 7]


def test_the_first_step_may_break_too(tmp_path: Path, meter: Meter) -> None:
    training = Training(tmp_path, meter)
    training.limit = 1e-6
    with pytest.raises(
        Diverged,
        match=r"stopped at step 1: .*above max_grad_norm 1e-06; lower lr .*; nothing was trained yet",
    ):
        training.go(8)


def test_a_full_disk_keeps_the_checkpoints_there_are(
    tmp_path: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path, meter)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def fill_the_disk() -> None:
        monkeypatch.setattr(checkpoint, "save_file", full)

    with pytest.raises(UserError, match="no disk space left"):
        training.go(8, dies_at(training, 5, fill_the_disk))
    monkeypatch.undo()
    assert Training(tmp_path, meter).go(8).done == [4, 5, 6, 7]


def test_loading_and_checkpoints_are_booked(tmp_path: Path, meter: Meter) -> None:
    Training(tmp_path / "run", meter).go(5)
    meter.close()
    lines, _ = ledger.read(tmp_path / "ledger.jsonl")
    assert [line["step"] for line in lines if line["activity"] == "checkpoint"] == [1, 3, 4]
    assert sum(line["activity"] == "load" for line in lines) == 1


def test_what_a_step_moves_besides_the_weights_comes_back(tmp_path: Path, meter: Meter) -> None:
    def bias(stop_at: int | None) -> torch.Tensor:
        layer = nn.Linear(2, 1, bias=False)
        weights, moved = MasterWeights(layer, "adamw", 0.1, (0.9, 0.95), 0.0), torch.zeros(3)

        def step(number: int) -> dict[str, Any]:
            if number == stop_at:
                raise KeyboardInterrupt
            layer(torch.ones(2)).sum().backward()
            weights.step(0.1)
            moved.add_(number + 1)
            return {"step": number + 1}

        train(
            tmp_path, 4, weights, {}, step, meter=meter, checkpoint_every=2, progress=Progress(),
            buffers={"bias": moved},
        )  # fmt: skip
        return moved

    with pytest.raises(KeyboardInterrupt):
        bias(stop_at=3)  # the third step's move is in no checkpoint
    assert torch.equal(bias(stop_at=None), torch.full((3,), 10.0))


def without(number: int) -> Callable[[str], str]:
    return lambda text: "".join(line for at, line in enumerate(text.splitlines(True)) if at != number)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text.replace('"norm"', '"morn"', 1),
        lambda text: "\x00" + text[1:],
        lambda text: text.replace('"right": 0.9', '"right": 0.1'),
        lambda text: text.replace('"right": 0.2', '"right": 0.99'),
        lambda text: "",
        without(0),
        without(1),
        without(3),
    ],
)
def test_damaged_metrics_are_said_and_do_not_change_which_weights_are_best(
    damage: Callable[[str], str], tmp_path: Path, meter: Meter
) -> None:
    right = [0.1, 0.9, 0.2, 0.3, 0.4, 0.5, 0.4]
    said: list[str] = []

    def go(training: Training, step: Step | None = None) -> None:
        progress = Progress(warn=said.append, measure=lambda step: {"right": right[step - 1]}, best="right")
        train(
            training.folder, 7, training.weights, training.state, step or training.step, meter=meter,
            checkpoint_every=2, progress=progress,
        )  # fmt: skip

    whole = Training(tmp_path / "whole", meter)
    go(whole)
    died = Training(tmp_path / "damaged", meter)
    with pytest.raises(KeyboardInterrupt):
        go(died, dies_at(died, 5, power_cut))
    assert not said
    path = died.folder / "metrics.jsonl"
    path.write_text(damage(path.read_text()))
    resumed = Training(tmp_path / "damaged", meter)
    go(resumed)
    assert said == [
        f"{path} is not what the checkpoint of step 4 was written with: either it has changed, which changes only what "
        "is shown of those steps, or the checkpoint is another run's"
    ]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert best_step(resumed.lines(), "right") == 2


def test_a_checkpoint_of_another_run_is_not_taken_in_silence(tmp_path: Path, meter: Meter) -> None:
    for name, scale in (("ours", 1.0), ("theirs", 0.5)):
        training = Training(tmp_path / name, meter)
        training.loss_scale = scale
        training.go(2)
    shutil.rmtree(tmp_path / "ours/state")
    shutil.copytree(tmp_path / "theirs/state", tmp_path / "ours/state")
    said: list[str] = []
    ours = Training(tmp_path / "ours", meter)
    train(
        ours.folder, 4, ours.weights, ours.state, ours.step, meter=meter, checkpoint_every=2,
        progress=Progress(warn=said.append),
    )  # fmt: skip
    assert len(said) == 1
    assert "another run's" in said[0]


def test_a_whole_stage_of_a_run_with_other_settings_is_refused(tmp_path: Path, meter: Meter) -> None:
    def go(steps: int, origin: str) -> None:
        ours = Training(tmp_path, meter)
        train(
            ours.folder, steps, ours.weights, ours.state, ours.step, meter=meter, checkpoint_every=2,
            progress=Progress(origin=origin),
        )  # fmt: skip

    go(2, "theirs")
    with pytest.raises(UserError, match=r"the checkpoint of step 2 is of another run; remove .* to train"):
        go(4, "ours")
    go(4, "theirs")
