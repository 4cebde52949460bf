"""A device given as JSON goes through every kind of plan."""

import json

import pytest
from typer.testing import CliRunner

from farthing.base.errors import UserError
from farthing.cli import app
from farthing.plans.published import published_runs

OWN = '{"name": "Mine", "flops": 1e15, "memory": 80e9, "usd": 2.0}'


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({run.name: run for run in published_runs()}["pythia-160m"].config))
    return str(path)


def farthing(*arguments):
    return CliRunner().invoke(app, ["plan", *arguments])


def planned(*arguments):
    done = farthing(*arguments, "--json")
    assert done.exit_code == 0
    return json.loads(done.stdout)


def test_a_network_is_planned_on_it(config):
    plan = planned(config, "--tokens", "10B", "--gpu", OWN)
    assert plan["device"] == "Mine"
    assert plan["usd"]["likely"] == pytest.approx(2 * plan["device_hours"]["likely"])
    assert plan["memory_bytes_of_device"] == 80e9
    assert plan["peak_flops"] == {"bfloat16": 1e15}


def test_twice_as_fast_takes_about_half_as_long(config):
    once = planned(config, "--tokens", "10B", "--gpu", OWN)
    twice = planned(config, "--tokens", "10B", "--gpu", OWN.replace("1e15", "2e15"))
    assert twice["device_hours"]["likely"] / once["device_hours"]["likely"] == pytest.approx(0.5, abs=0.1)


def test_recipes_and_budgets_take_it():
    assert planned("quickstart", "--gpu", OWN)["device"] == "Mine"
    assert "5,000 on Mine: 2,500 device-hours" in farthing("--budget", "5000", "--gpu", OWN).stdout


@pytest.mark.parametrize("gpu", ['{"flops": 1e15}', "{", "rtx 6000", '{"flops": 989, "memory": 80e9}'])
def test_a_wrong_one_is_one_line(config, gpu):
    done = farthing(config, "--tokens", "10B", "--gpu", gpu)
    assert done.stdout == ""
    assert isinstance(done.exception, UserError)
    assert "\n" not in str(done.exception)
