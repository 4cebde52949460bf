import json

import pytest
from typer.testing import CliRunner

from farthing.cli import app
from farthing.plans.published import published_runs

LARGE = {run.name: run.config for run in published_runs()}["llama2-70b"]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LARGE))
    return str(path)


def farthing(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_json_is_one_object_and_nothing_else(config):
    done = farthing(
        config, "--tokens", "2T", "--seq-len", "4096", "--gpu", "a100-80gb", "--count", "1024", "--json"
    )
    assert done.exit_code == 0
    data = json.loads(done.stdout)
    assert data["fits"] is True
    assert data["device_hours"]["low"] < 1_720_320 < data["device_hours"]["high"]  # its model card


def test_a_plan_that_does_not_fit_is_printed_as_json_and_refused(config):
    done = farthing(config, "--tokens", "2T", "--gpu", "4090", "--count", "8", "--json")
    assert json.loads(done.stdout)["fits"] is False
    assert "does not fit" in str(done.exception)
    assert "use " in str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to plan"),
        (("CONFIG",), "--tokens"),
        (("CONFIG", "--tokens", "1T", "--gpu", "h1o0"), "did you mean h100"),
        (("CONFIG", "--tokens", "15X"), "15X"),
        (("CONFIG", "--tokens", "1T", "--price", "0"), "--price"),
        (("CONFIG", "--tokens", "1T", "--gpu", "nope"), "the names known are cpu, h100, a100,"),
        (
            ("CONFIG", "--tokens", "1T", "--set", "a=1"),
            "--set, --device, --dtype and --pass-rate are about a recipe",
        ),
        (("CONFIG", "--tokens", "1T", "--pass-rate", "0.5"), "--pass-rate are about a recipe"),
        (("CONFIG", "--tokens", "1T", "--inference-tokens", "1T"), "--inference-tokens goes with --budget"),
        (("CONFIG", "--tokens", "-1T"), "--tokens: -1T must be above 0"),
        (("quickstart", "--tokens", "1T"), "leave --tokens"),
        (("quickstart", "--count", "2"), "--count 2: several devices are planned for a GPU"),
        (("quickstart", "--method", "lora"), "a recipe does not go with --method"),
        (("CONFIG", "--tokens", "1T", "--steps", "5"), "pretraining does not go with --steps"),
        (("CONFIG", "--tokens", "1T", "--count", "8", "--batch", "4"), "fewer sequences than the 8 devices"),
        (("CONFIG", "--tokens", "1T", "--kept", "0.5"), "pretraining does not go with --kept"),
        (("quickstart", "--seq-len", "64"), "a recipe does not go with --seq-len"),
        (("quickstart", "--precision", "fp8"), "a recipe does not go with --precision"),
        (("quickstart", "--inference-tokens", "1T"), "a recipe does not go with --inference-tokens"),
        (("quickstart", "--budget", "5"), "--budget does not go with a recipe or model"),
        (
            ("CONFIG", "--budget", "5", "--tokens", "1T"),
            "--budget does not go with a recipe or model, --tokens",
        ),
        (("--budget", "5", "--set", "a=1"), "--budget does not go with --set"),
        (("--budget", "5", "--seq-len", "64"), "--budget does not go with --seq-len"),
        (("--budget", "5", "--pass-rate", "0.5"), "--budget does not go with --pass-rate"),
        (("--validate", "quickstart"), "--validate does not go with a recipe or model"),
        (("--budget", "0"), "--budget: 0 must be above 0"),
        (("--budget", "-3"), "--budget: -3 must be above 0"),
        (
            ("--budget", "much"),
            "--budget: 'much' is not an amount; write it as 5000, 1.5M or 2e6, in dollars",
        ),
        (("--budget", "5000", "--precision", "fp9"), "--precision fp9: must be bf16, fp16, fp8"),
        (("--budget", "5000", "--precision", "fp8", "--gpu", "a100"), "has no FP8"),
        (("--budget", "5000", "--gpu", "h20"), "give --price"),
    ],
)
def test_mistakes_are_said(config, arguments, said):
    done = farthing(*(config if word == "CONFIG" else word for word in arguments))
    assert said in str(done.exception)


def test_a_method_is_planned_and_what_would_fit_is_listed(config):
    done = farthing(config, "--method", "qlora", "--steps", "100", "--gpu", "a100", "--seq-len", "1024")
    assert done.exit_code == 0
    assert "qlora on 1 x NVIDIA A100" in done.stdout
    assert "another trainer runs it" in done.stdout
    assert "add --fused-loss" in done.stdout


def test_a_teacher_is_another_config(config):
    asked = (config, "--method", "distill", "--steps", "9", "--count", "64", "--batch", "64", "--json")
    alone, taught = (json.loads(farthing(*asked, *more).stdout) for more in ((), ("--teacher", config)))
    assert taught["memory_bytes_per_device"] > alone["memory_bytes_per_device"]
    assert taught["device_hours"]["likely"] > alone["device_hours"]["likely"]


def test_a_method_that_does_not_fit_is_printed_and_refused_with_the_change(config):
    arguments = (config, "--method", "lora", "--steps", "100", "--gpu", "a100", "--seq-len", "1024")
    done = farthing(*arguments, "--json")
    data = json.loads(done.stdout)
    assert data["fits"] is False
    fitting = [change for change in data["changes"] if change["fits"]]
    assert data["remedy"] in [change["change"] for change in fitting]
    assert f"does not fit on 1 x {data['device']}" in str(done.exception)
    assert data["remedy"] in str(done.exception)
    assert "cheapest that fits" in farthing(*arguments).stdout


def test_a_budget_is_answered_by_every_law():
    data = json.loads(farthing("--budget", "5000", "--json").stdout)
    assert len(data["choices"]) == 4
    assert json.loads(farthing("--budget", "$5,000", "--json").stdout) == data


def test_the_examination_is_printed():
    data = json.loads(farthing("--validate", "--json").stdout)
    assert data["summary"]["model"]["runs"] == len(data["rows"]) == 50
