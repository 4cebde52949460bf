"""Plans, from whatever names them: a recipe, a config.json, or the folder, repository or package that holds one.

`plan` is the public function. The arithmetic lives in `cost`; here names are turned into configs, which requires
knowledge that lower packages must not have: where weights come from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from farthing.base.arguments import takes
from farthing.base.device import Place, choose
from farthing.base.errors import UserError
from farthing.base.figures import bytes_, parse_amount
from farthing.base.files import open_ready
from farthing.base.limits import named
from farthing.cost import devices
from farthing.cost.devices import peak
from farthing.cost.flops import causal_pairs, flops_per_token, parameters
from farthing.cost.shapes import scoring_config
from farthing.plans import measured as calibration
from farthing.plans.efficiency import Efficiency
from farthing.plans.measured import Calibration
from farthing.plans.methods import MethodPlan, method_of, optimizer_of, plan_method
from farthing.plans.recipe import RecipePlan, check_pass_rate, known_pass_rate, plan_recipe
from farthing.plans.speed import Measured
from farthing.plans.training import SEQ_LEN, Plan, plan_training
from farthing.recipe import Recipe, builtin, load
from farthing.tasks.check import check
from farthing.tasks.data import models_asked

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")
_MAX_BYTES = 10_000_000


@takes(
    what=(str, Path, Recipe, Mapping),
    tokens=(str, float, None),
    device=(str, None),
    count=(int, None),
    seq_len=(int, None),
    precision=(str,),
    price=(float, None),
    pass_rate=(float, None),
    method=(str, None),
    batch=(int, None),
    optimizer=(str, None),
    examples=(int, None),
    steps=(int, None),
    lora=(int, None),
    fused_loss=(bool,),
    offload=(bool,),
    teacher=(str, Path, Mapping, None),
    answer_length=(float, None),
    kept=(float, None),
)
def plan(
    what: str | Path | Recipe | Mapping[str, Any],
    *,
    tokens: str | float | None = None,
    device: str | None = None,
    count: int | None = None,
    seq_len: int | None = None,
    precision: str = "bf16",
    price: float | None = None,
    pass_rate: float | None = None,
    method: str | None = None,
    batch: int | None = None,
    optimizer: str | None = None,
    examples: int | None = None,
    steps: int | None = None,
    lora: int | None = None,
    fused_loss: bool = False,
    offload: bool = False,
    teacher: str | Path | Mapping[str, Any] | None = None,
    answer_length: float | None = None,
    kept: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan | RecipePlan | MethodPlan:
    """Plan a recipe, training a network from nothing on so many tokens, or training a model by some method.

    Args:
        what: a recipe, its name or file; a config.json (its path, or the table in it); a model that
            `farthing.load` takes.
        tokens: to train a network on, as a number or as "14.8T".
        device: a name of the catalogue, read leniently: "h800", "a100-40gb", "rtx4090"; "cpu" is this
            machine. None takes h100, or for a recipe the device its rates name, or this machine.
        count: devices; None finds a sensible number to pretrain on, and takes one otherwise.
        seq_len: tokens of a sequence.
        precision: "bf16", "fp16", "pure-bf16", or "fp8" to pretrain.
        price: dollars a device-hour; None takes the catalogue's.
        pass_rate: share of its answers that a recipe's base gets right; 0 is refused.
        method: "pretrain", "full", "lora", "qlora", "dpo", "grpo" or "distill"; None pretrains.
        batch, optimizer, examples, steps, lora, fused_loss, offload, teacher: as `plans.methods.plan_method`.
        answer_length, kept: mean tokens of a sampled answer, and the share of groups trained on.
        say: called with a sentence for what is measured.

    Raises UserError for an unreadable or unknown source, and a plan that cannot work.
    """
    if isinstance(what, str | Path):
        named(what)
    if isinstance(what, str | Path) and is_recipe(str(what)):
        what = load(what)
    if isinstance(what, Recipe):
        if tokens is not None:
            raise UserError("a recipe says its own tokens; leave --tokens")
        return _plan_recipe(what, device, price, pass_rate, count or 1, answer_length, kept, say)
    config = what if isinstance(what, Mapping) else config_of(what)
    chosen = devices.find(device or "h100")
    how, chosen_optimizer = method_of(method or "pretrain"), optimizer_of(optimizer or "adamw")
    name = str(config.get("model_type")) if isinstance(what, Mapping) else str(what)
    amount = None if tokens is None else parse_amount(tokens, "--tokens")
    if how != "pretrain":
        taught = teacher if isinstance(teacher, Mapping) or teacher is None else config_of(teacher)
        return plan_method(
            config, how, device=chosen, count=count, seq_len=seq_len, batch=batch, optimizer=chosen_optimizer,
            precision=precision, tokens=amount, examples=examples, steps=steps, lora=lora, fused_loss=fused_loss,
            offload=offload, teacher=taught, answer_length=answer_length, kept=kept, price=price, name=name,
        )  # fmt: skip
    if amount is None:
        raise UserError("say how many tokens to train on: --tokens 1T")
    return plan_training(
        config,
        tokens=amount,
        device=chosen,
        count=count,
        seq_len=seq_len,
        precision=precision,
        optimizer=chosen_optimizer,
        batch=batch,
        price=price,
        name=name,
        reached=_measured(config, seq_len) if chosen.kind == "cpu" else None,
    )


def this_machine(place: Place | None = None, say: Callable[[str], None] = lambda _: None) -> Calibration:
    """The calibration of this machine's CPU in the dtype of `place`, by default the one that `choose` finds best.

    Measures now, in at most ten seconds, if there is no calibration yet, and keeps it if possible.

    Args:
        say: called with a sentence for what is measured.
    """
    place = place or choose("cpu")
    known = _known(place.dtype)
    if known is not None:
        return known
    from farthing.plans.calibrate import calibrate

    say(f"this machine is being measured once in {place.dtype}:")
    found = calibrate(place, say)
    try:
        calibration.save(found)
    except UserError as error:  # the plan matters more than keeping the calibration
        say(f"not kept: {error}")
    return found


def _known(dtype: str) -> Calibration | None:
    """The calibration kept for a dtype, if it was made on this processor with the instructions in use now."""
    from farthing.plans.calibrate import instructions

    known = calibration.load(dtype)
    if known is None or known.device != devices.detect("cpu").name or known.instructions != instructions():
        return None
    return known


def for_run(recipe: Recipe, base: Mapping[str, Any] | None, place: Place) -> RecipePlan | None:
    """The plan of a run about to start on this machine, to be shown beside what it takes.

    Args:
        base: config.json of its base; None if it starts from nothing.
        place: where it computes and in what.

    Returns:
        None where nothing was measured yet (a run measures nothing for this), or nothing can be planned.

    Raises:
        UserError: if the run needs more memory than its device has; says what would fit.
    """
    try:
        here = devices.detect(place.device)
        known = _known(place.dtype) if here.kind == "cpu" else None
        planned = plan_recipe(recipe, base, here, known, dtype=place.dtype, asked=asked_configs(recipe))
    except UserError:  # the run itself says what is wrong, or knows better
        return None
    if not planned.fits:
        raise UserError(_too_large(planned))
    return planned if known or here.kind != "cpu" else None


def _too_large(planned: RecipePlan) -> str:
    return (
        f"{planned.recipe.name} does not fit on {_named(planned)}: it needs {bytes_(planned.memory_bytes)} of "
        f"its {bytes_(planned.device.memory_bytes)}; {_smaller(planned)}"
    )


def _named(planned: RecipePlan) -> str:
    return planned.device.name if planned.count == 1 else f"{planned.count} x {planned.device.name}"


def _plan_recipe(
    recipe: Recipe,
    device: str | None,
    price: float | None,
    pass_rate: float | None,
    count: int,
    answer_length: float | None,
    kept: float | None,
    say: Callable[[str], None],
) -> RecipePlan:
    check(recipe)
    named = device or (next(iter(recipe.rates)) if len(recipe.rates) == 1 else None)
    found = devices.find(named) if named else None
    if count > 1 and (found is None or found.kind == "cpu"):
        raise UserError(f"--count {count}: several devices are planned for a GPU; name one, --gpu h100")
    if pass_rate is None:
        pass_rate = known_pass_rate(Path("runs") / recipe.name)
    check_pass_rate(recipe, pass_rate)
    base = None if recipe.base is None else config_of(recipe.base)
    known, dtype = None, None
    if found is None or found.kind == "cpu":
        place = choose("cpu" if found else recipe.device, recipe.dtype)
        found, dtype = devices.detect(place.device), place.dtype
        known = this_machine(place, say) if found.kind == "cpu" else None
    asked = asked_configs(recipe)
    planned = plan_recipe(
        recipe, base, found, known, dtype=dtype, price=price, asked=asked,
        count=count, answer_length=answer_length, kept=kept,
    )  # fmt: skip
    if not planned.fits:
        raise UserError(_too_large(planned))
    return planned


def _smaller(planned: RecipePlan) -> str:
    """The cheapest change that makes a recipe fit: LoRA if that is enough, or else a device with the memory for it."""
    room = [d for d in devices.catalogue() if d.memory_bytes >= planned.memory_bytes and d.prices]
    device = min(room, key=lambda d: d.prices[0].usd, default=None)
    another = f"use --gpu {device.aliases[0]}" if device else "take a smaller base"
    stages = [stage.with_lora(16) for stage in planned.recipe.stages]
    if None in stages:
        return another
    lighter = planned.recipe.model_copy(update={"stages": stages})
    asked = asked_configs(planned.recipe)
    tried = plan_recipe(
        lighter, planned.config, planned.device, None, dtype=planned.dtype, asked=asked, count=planned.count
    )
    return f"set lora: 16 in its stages, or {another}" if tried.fits else another


def _measured(config: Mapping[str, Any], seq_len: int | None) -> Efficiency | None:
    """Efficiency of this machine in training the network; None if it was not measured."""
    known = _known(choose("cpu").dtype)
    if known is None:
        return None
    length = seq_len or SEQ_LEN
    work = flops_per_token(config, length, mtp=False).model * length
    speed = Measured(known)
    seconds = speed.train(config, length, causal_pairs(length), length)
    seconds += speed.optimizer(parameters(config).total)
    likely = work / seconds / peak(devices.find("cpu"))
    return Efficiency(likely / 1.5, likely, likely * 1.5)


def asked_configs(recipe: Recipe) -> list[dict[str, Any]]:
    """config.json of each model of this machine that a recipe's rewards ask. Raises UserError when there is none."""
    return [
        scoring_config(config_of(source)) if use == "reward_model" else config_of(source)
        for source, use in models_asked(recipe).items()
    ]


def is_recipe(what: str) -> bool:
    """Whether this names a built-in recipe or a YAML file."""
    return what in [name for name, _ in builtin()] or Path(what).suffix.lower() in (".yaml", ".yml")


def config_of(source: str | Path) -> dict[str, Any]:
    """The config.json of a source: a .json file, a model folder, a repository (of which only that file is
    fetched), or anything else that `weights.sources` takes. Raises UserError when there is none.
    """
    path = Path(source)
    if path.suffix == ".json" or (path / "config.json").is_file():
        return _read(path if path.suffix == ".json" else path / "config.json")
    repository = str(source).removeprefix("hf:")
    if str(source).startswith("hf:") or (_HUB_ID.fullmatch(repository) and not path.parent.exists()):
        return _read(_fetch(repository))
    from farthing.weights.sources import model_folder

    return _read(model_folder(source) / "config.json")


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_ready(path) as file:
            config = json.loads(file.read(_MAX_BYTES))
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); give the config.json of a model"
        ) from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: is not JSON; give the config.json of a model") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"{path}: has no model_type, so it is not a model's config; give a config.json")
    return config


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision or None))
    except Exception as error:  # the library's errors share no base, and change with its HTTP client
        raise UserError(
            f"hf:{name}: its config.json cannot be fetched ({type(error).__name__}); give the path of one"
        ) from None
