"""Money: what a plan costs, what a run has cost, and whether a claim can be true."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from farthing.base.errors import UserError
from farthing.cli.help import claim_names, recipe_names, run_names
from farthing.cli.shared import (
    DeviceName,
    DeviceOr,
    Dtype,
    DtypeOr,
    Json,
    log,
    may_overwrite,
    only_results_on_stdout,
    placed,
    print_result,
    print_text,
    run_folder,
)


def plan(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE|MODEL|CONFIG.json",
            help="A recipe, a model (folder, hf:OWNER/NAME, pypi:NAME), or a config.json.",
            autocompletion=recipe_names,
        ),
    ] = None,
    method: Annotated[
        Literal["pretrain", "full", "lora", "qlora", "dpo", "grpo", "distill"] | None,
        typer.Option(help="How a model is trained; pretrain by default."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on: 14.8T, 300B, 1.5e13.")] = None,
    examples: Annotated[
        int | None,
        typer.Option(help="Or examples: sequences, pairs (dpo) or answers (grpo), epochs included."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Or optimizer steps.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of the longest sequence; 4096 by default.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Examples of a step; 16 by default.")] = None,
    optimizer: Annotated[
        Literal["adamw", "muon", "adamw-8bit"] | None, typer.Option(help="adamw by default.")
    ] = None,
    lora: Annotated[
        int | None, typer.Option(metavar="RANK", help="Train adapters; 16 by default for lora and qlora.")
    ] = None,
    fused_loss: Annotated[
        bool, typer.Option("--fused-loss", help="One kernel for the loss, without float32 logits.")
    ] = False,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep the optimizer's states and gradients on the host.")
    ] = False,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whose logits distill learns; its text if not given.")
    ] = None,
    answer_length: Annotated[
        float | None, typer.Option(help="Mean tokens of a sampled answer, if known.")
    ] = None,
    kept: Annotated[
        float | None, typer.Option(help="Share of the groups of answers that are trained on, if known.")
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="The device: h100, a100-40gb, rtx4090, cpu, …")] = None,
    count: Annotated[
        int | None, typer.Option(help="How many devices; chosen to pretrain, else 1 by default.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="bf16, fp16, pure-bf16, or fp8 to pretrain; bf16 by default, or a recipe's own dtype."
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="Dollars per device-hour; the catalogue's by default.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change one key of the recipe. Repeatable."),
    ] = None,
    device: DeviceOr = None,
    dtype: DtypeOr = None,
    pass_rate: Annotated[
        float | None, typer.Option(help="Share of answers that a recipe's base gets right, if known.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="The largest model and tokens for this money.")
    ] = None,
    inference_tokens: Annotated[
        str | None, typer.Option(help="Tokens that model will read and write in use, for --budget.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Print the model's predictions beside published runs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Estimate what a run would cost before it starts, or refuse it with a reason."""
    changes = [*(set_ or ()), *placed(device, dtype)]
    given = {
        "WHAT": what, "--tokens": tokens, "--seq-len": seq_len, "--gpu": gpu, "--count": count,
        "--precision": precision, "--price": price, "--set, --device or --dtype": changes or None,
        "--pass-rate": pass_rate, "--budget": budget, "--inference-tokens": inference_tokens,
        "--method": method, "--examples": examples, "--steps": steps, "--batch": batch, "--optimizer": optimizer,
        "--lora": lora, "--fused-loss": fused_loss or None, "--offload": offload or None, "--teacher": teacher,
        "--answer-length": answer_length, "--kept": kept,
    }  # fmt: skip
    if validate:
        _only("--validate", given)
        from farthing.plans.efficiency import validation_json, validation_text

        print_result(validation_json(), validation_text(), as_json)
        return
    if budget is not None:
        _only(
            "--budget", given, "--gpu", "--count", "--precision", "--price", "--inference-tokens", "--budget"
        )
        _plan_budget(budget, gpu, count, precision or "bf16", price, inference_tokens, as_json)
        return
    from farthing import plans
    from farthing.plans.methods import MethodPlan, method_text
    from farthing.plans.recipe import RecipePlan, recipe_text
    from farthing.plans.training import plan_text
    from farthing.recipe import load

    if what is None:
        raise UserError("say what to plan: a recipe, a model, or a config.json")
    if plans.is_recipe(what):
        _only(
            "a recipe",
            given,
            "WHAT",
            "--tokens",
            "--count",
            "--gpu",
            "--price",
            "--set, --device or --dtype",
            "--pass-rate",
            "--answer-length",
            "--kept",
        )
    elif changes or pass_rate is not None:
        raise UserError("--set, --device, --dtype and --pass-rate are about a recipe; name one")
    elif inference_tokens is not None:
        raise UserError("--inference-tokens goes with --budget")
    elif method in (None, "pretrain"):
        _only("pretraining", given, "WHAT", "--method", "--tokens", "--seq-len", "--gpu", "--count", "--precision",
              "--price", "--batch", "--optimizer")  # fmt: skip
    with only_results_on_stdout(f"planning {what}", libraries=True):
        found = plans.plan(
            load(what, changes) if changes else what,
            tokens=tokens,
            device=gpu,
            count=count,
            seq_len=seq_len,
            precision=precision or "bf16",
            price=price,
            pass_rate=pass_rate,
            method=method,
            batch=batch,
            optimizer=optimizer,
            examples=examples,
            steps=steps,
            lora=lora,
            fused_loss=fused_loss,
            offload=offload,
            teacher=teacher,
            answer_length=answer_length,
            kept=kept,
            say=log,
        )
    if isinstance(found, RecipePlan):
        print_result(found.as_json(), recipe_text(found), as_json)
        return
    if isinstance(found, MethodPlan):
        print_result(found.as_json(), method_text(found), as_json)
    elif found.fits or as_json:
        print_result(found.as_json(), plan_text(found), as_json)
    if not found.fits:
        from farthing.base.figures import bytes_

        raise UserError(
            f"{what} does not fit on {found.count} x {found.device.name}: it needs "
            f"{bytes_(found.least_bytes)} a device; {found.remedy}"
        )


def _only(what: str, given: Mapping[str, object], *allowed: str) -> None:
    """Raises UserError for an option that `what` would ignore."""
    extra = [name for name, value in given.items() if value is not None and name not in allowed]
    if extra:
        named = ", ".join("a recipe or model" if name == "WHAT" else name for name in extra)
        raise UserError(f"{what} does not go with {named}; leave one of them out")


def _plan_budget(
    dollars: str,
    gpu: str | None,
    count: int | None,
    precision: str,
    price: float | None,
    inference_tokens: str | None,
    as_json: bool,
) -> None:
    from farthing.base.figures import parse_amount
    from farthing.cost import devices
    from farthing.plans.budget import budget, budget_text
    from farthing.plans.training import check_count, check_precision, checked_price

    device = devices.find(gpu or "h100")
    check_count(count)
    check_precision(precision, device)
    paid, source = checked_price(device, price)
    if paid is None:
        raise UserError(f"no price is known for {device.name}: give --price")
    served = parse_amount(inference_tokens, "--inference-tokens") if inference_tokens else None
    found = budget(
        parse_amount(dollars.strip().removeprefix("$"), "--budget", "5000, 1.5M or 2e6, in dollars"),
        device,
        paid,
        source,
        precision=precision,
        count=count,
        inference_tokens=served,
    )
    print_result(found.as_json(), budget_text(found), as_json)


def calibrate(
    device: DeviceName = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure this machine in ten seconds, for plans that can be trusted."""
    from farthing.base.figures import duration, plural

    with only_results_on_stdout():
        from farthing.base.device import choose
        from farthing.plans.calibrate import calibrate as measure
        from farthing.plans.measured import save

        found = measure(choose(device, dtype), log)
        save(found)
    lines = [
        f"{found.device}, {plural(found.threads, 'thread')}, torch {found.torch}, in {found.dtype} "
        f"({found.instructions}), measured in {duration(found.took)}",
        f"  matrix products   {found.gemm_float32 / 1e9:.3g} GFLOP/s in float32, "
        f"{found.gemm_bfloat16 / 1e9:.3g} in bfloat16",
        f"  memory            {found.bandwidth / 1e9:.1f} GB/s copying",
        f"  disk              {found.disk / 1e6:.0f} MB/s, flushed and checked",
        f"  small operation   {found.small_op * 1e6:.2f} microseconds",
        f"  network           up to {found.timed} tokens at a time"
        if found.timed
        else "  network           not timed: machine too slow or busy; estimated from products and memory",
    ]
    for kind in ("decode", "prefill", "train"):
        pace = getattr(found, kind)
        rate = f"{1e-9 / pace.flop:.0f} GFLOP/s" if pace.flop else "its time does not grow with the rows"
        lines.append(f"  {kind:17} {pace.fixed * 1e3:.2f} ms a layer, then {rate}")
    lines.append(f"  optimizer         {found.optimizer * 1e9:.2f} ns a parameter")
    print_result(found.as_json(), "\n".join(lines), as_json)


def ledger(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...", help="Run directories, or names under runs/.", autocompletion=run_names
        ),
    ],
    by: Annotated[
        Literal["activity", "stage", "day", "run", "device"] | None,
        typer.Option(help="The table's rows; activity for one run and run for several by default."),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE=USD", help="The same bill at another price an hour. Repeatable."),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="The same bill at the rates of this YAML file; own hardware too.")
    ] = None,
    add: Annotated[
        str | None,
        typer.Option(metavar="ENTRY", help="Enter a cost that no clock saw: {kind: data, what: …, usd: …}."),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated rows.")] = False,
    as_json: Json = False,
) -> None:
    """Print what runs have cost: one bill for all of them, failed attempts included."""
    from farthing.base.schema import parse_text
    from farthing.cost import bill, spend
    from farthing.cost.ledger import merge

    if as_csv and as_json:
        raise UserError("give --csv or --json, not both")
    folders = list({folder.resolve(): folder for folder in map(run_folder, runs)}.values())
    if add is not None:
        if len(folders) != 1:
            raise UserError("--add enters into one run; give one RUN")
        spend.add_entry(folders[0], parse_text(add, "--add"))
    found = [spend.read_run(folder) for folder in folders]
    without = [str(folder) for folder, run in zip(folders, found, strict=True) if run is None]
    booked = [run for run in found if run is not None]
    if not booked:
        raise UserError(f"no ledger in {', '.join(without)}; give a run directory")
    if without:
        log(f"no ledger in {', '.join(without)}: left out")
    given = spend.read_rates(rates) if rates else {}
    given |= spend.parse_prices(price or ())
    booked = spend.with_rates(booked, given)
    if as_csv:
        print_text(spend.as_csv(booked).rstrip("\n"))
        return
    data = {**spend.as_json(booked), "left_out": without}
    total = merge([run.summary for run in booked])
    by = by or ("run" if len(booked) > 1 else "activity")
    rows = None if by == "activity" else [(key, row) for (key,), row in spend.group(booked, by).items()]
    bought = [(f"{entry.kind}: {entry.what}", entry.cost) for run in booked for entry in run.entries]
    notes = [f"{run.name}: {note}" for run in booked for note in run.notes]
    width = shutil.get_terminal_size((120, 24)).columns
    title = booked[0].name if len(booked) == 1 else f"{len(booked)} runs"
    text = bill.bill_text(total, title, width, rows, bought, notes)
    if (served := spend.serving(booked)).rows:
        text += "\n" + bill.bill_text(served, "serving since then, which the bill above does not hold", width)
    print_result(data, text.rstrip("\n"), as_json)


def claim(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE.yaml", help="A built-in claim, or your own.", autocompletion=claim_names
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a claim about a model's cost; without a name, list the built-in claims."""
    from farthing.claims import claim as claims
    from farthing.claims.check import check
    from farthing.claims.text import data, text

    if name is None:
        found = [claims.load(each) for each in claims.builtin()]
        width = max(len(each.name) for each in found)
        lines = "\n".join(f"{each.name:{width}}  {each.title}" for each in found)
        print_result({"claims": [{"name": each.name, "title": each.title} for each in found]}, lines, as_json)
        return
    finding = check(claims.load(name))
    print_result(data(finding), text(finding), as_json)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...", help="Run directories, or names under runs/.", autocompletion=run_names
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write the comparison as a page, with the plots.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="The variant whose learning curve the others are compared with.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare what runs cost with what they can do, and how they learned."""
    from farthing.report import compare as comparing

    found = comparing.compare(list({f.resolve(): f for f in map(run_folder, runs)}.values()), baseline)
    if out is not None:
        if not _is_page(out):
            may_overwrite(out)
        comparing.write_html(found, out)
        log(f"written: {out}")
    print_result(comparing.as_json(found), comparing.as_text(found), as_json)


def _is_page(path: Path) -> bool:
    """Whether a file is a page, such as an earlier comparison, which may be replaced."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(15).lower() == b"<!doctype html>"


COMMANDS: tuple[Callable[..., Any], ...] = (plan, calibrate, ledger, claim, compare)
