"""`farthing eval`: models on held-out questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from farthing.base.errors import UserError
from farthing.base.figures import interval, percent, points
from farthing.cli.help import recipe_names, run_names
from farthing.cli.shared import (
    DeviceOr,
    DtypeOr,
    Json,
    Quantize,
    Seed,
    log,
    model_source,
    only_results_on_stdout,
    print_result,
    starting,
)

FEWEST = 200  # questions where nobody says how many


def evaluate(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="A run, model folder, .gguf, hf:owner/name or pypi:name; two are compared.",
            autocompletion=run_names,
        ),
    ],
    suite: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A set of questions by name. Repeatable.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help='Tasks: "chain_sum", "chain_sum=2,gcd=1", or YAML.')
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Ask this recipe's questions, in its way.", autocompletion=recipe_names)
    ] = None,
    n: Annotated[
        int | None, typer.Option("--n", "-n", min=1, help="Questions of each; the recipe's number, or 200.")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Solved examples before each question; the suite's own number.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Answers to each question; the recipe's own, or 1.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 answers greedily; the recipe's own, or 0.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer, in tokens; the recipe's own, or 1024.")
    ] = None,
    generate: Annotated[
        bool,
        typer.Option("--generate", help="Have multiple choice answered in words, not by likelihood."),
    ] = False,
    save: Annotated[Path | None, typer.Option(help="Write every answer to this file, a line each.")] = None,
    seed: Seed = None,
    speculate: Annotated[
        int, typer.Option(min=0, help="Tokens to guess a step with the model's prediction modules.")
    ] = 0,
    device: DeviceOr = None,
    dtype: DtypeOr = None,
    quantize: Quantize = "exact",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out questions, or compare two on the same."""
    from farthing.recipe import load, parse_tasks, plain_asks

    if len(sources) > 2:
        raise UserError(f"farthing eval takes a model, or two to compare, not {len(sources)}")
    if sum(given is not None for given in (recipe, tasks, suite or None)) != 1:
        raise UserError('farthing eval needs either --tasks "chain_sum", --suite NAME or --recipe RECIPE')
    asked = load(recipe, seed=seed) if recipe is not None else None
    settings = asked.evaluate if asked else None
    if asked is not None:
        mixtures = {asked.name: asked.asks()}
    elif tasks is not None:
        mixtures = {"tasks": plain_asks(_with_shots(parse_tasks(tasks), shots))}
    else:
        mixtures = {name: plain_asks(_with_shots(parse_tasks(name), shots)) for name in suite or ()}
    if asked is not None and shots is not None:
        raise UserError("--shots is for --suite and --tasks; a recipe says its own")
    chosen = [model_source(source) for source in sources]
    with only_results_on_stdout():
        with starting():
            from farthing.cost.room import room_for
            from farthing.evaluate.suites import Suite, evaluate_sources

        asks = {
            name: each._replace(max_new_tokens=max_new_tokens) if max_new_tokens else each
            for name, each in mixtures.items()
        }
        suites = [
            Suite(
                name,
                each,
                n or (settings.held_out if settings else FEWEST),
                samples=samples or (settings.samples if settings else 1),
                temperature=temperature
                if temperature is not None
                else settings.temperature
                if settings
                else 0.0,
                by_likelihood=asked is None and not generate,
            )
            for name, each in asks.items()
        ]
        device, dtype = (
            device or (asked.device if asked else "auto"),
            dtype or (asked.dtype if asked else "auto"),
        )
        with room_for(f"evaluating {' and '.join(sources)}", chosen[0], device, dtype):
            card = evaluate_sources(
                chosen,
                suites,
                seed=asked.seed if asked else seed or 0,
                speculate=speculate,
                device=device,
                dtype=dtype,
                quantize=quantize,
                save=save,
                say=log,
            )
    print_result(card, "\n".join(_said(card, sources)), as_json)


def _with_shots(tasks: Any, shots: int | None) -> Any:
    """The tasks as written, each with so many examples."""
    if shots is None or not isinstance(tasks, dict):
        return tasks
    from farthing.tasks.sets import SETS

    for name, setting in tasks.items():
        if name not in SETS and not (isinstance(setting, dict) and "path" in setting):
            raise UserError(f"--shots: {name} has no solved examples; they come from data, or a suite's own")
    tables = {
        name: setting if isinstance(setting, dict) else {"weight": setting} for name, setting in tasks.items()
    }
    return {name: {**table, "shots": shots} for name, table in tables.items()}


def _said(card: dict[str, Any], sources: list[str]) -> list[str]:
    if "models" not in card:
        return [_sentence(sources[0], card)]
    several = len(card["models"][0]["suites"]) > 1
    lines = [
        _sentence(f"{source}, {summary['name']}" if several else source, summary)
        for source, model in zip(sources, card["models"], strict=True)
        for summary in model["suites"]
    ]
    for compared in card.get("compared", ()):
        low, high = compared["ci95"]
        what = f"{compared['suite']}: " if several else ""
        line = (
            f"{what}{sources[1]} against {sources[0]}: {points(compared['difference'])} points "
            f"(95% interval {points(low)} to {points(high)}), {_FOUND[compared['finding']]}"
        )
        if "mcnemar_p" in compared:
            line += f"; McNemar's p {compared['mcnemar_p']:.2g}"
        lines.append(line)
    return lines


_FOUND = {
    "rose": "better",
    "fell": "worse",
    "no clear change": "no clear difference",
    "too few to tell": "too few questions to tell",
}


def _sentence(name: str, card: dict[str, Any]) -> str:
    line = f"{name}: {percent(card['accuracy'])} right of {card['n']} (95% interval {interval(card['ci95'])})"
    if (normalised := card.get("acc_norm")) is not None:
        line += (
            f", {percent(normalised['accuracy'])} by likelihood per character "
            f"({interval(normalised['ci95'])})"
        )
    for kind, said in (("pass_at", "pass@"), ("maj_at", "maj@")):
        for k, value in card.get(kind, {}).items():
            line += f", {said}{k} {percent(value['accuracy'])} ({interval(value['ci95'])})"
    line += f"; {card['wrong']} wrong, {card['unparsed']} unparsed, {card['cut_off']} cut off"
    if "acceptance" in card:
        line += "; guesses right " + ", ".join(percent(share, 0) for share in card["acceptance"])
    return line
