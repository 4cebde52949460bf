"""`farthing doctor`: the beginning of a bug report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from farthing.base.figures import bytes_
from farthing.cli.shared import RUNS, Json, only_results_on_stdout, print_result


def doctor(
    offline: Annotated[bool, typer.Option("--offline", help="Do not contact the model hub.")] = False,
    as_json: Json = False,
) -> None:
    """Describe this machine, the choices made for it, and what works. The output holds no secrets."""
    with only_results_on_stdout("examining and measuring this machine", libraries=True):
        from farthing.doctor import examine

        found = examine(offline=offline, runs=RUNS)
    print_result(found, "\n".join(_lines(found)), as_json)


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"farthing {found['version'] or 'of unknown version'}"
    for title, rows in _parts(found):
        yield title
        width = max(len(name) for name, _ in rows)
        yield from (f"  {name:{width}}  {text}" for name, text in rows)


def _parts(found: dict[str, Any]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    yield "machine", [*_machine(found["machine"]), *_gpus(found["gpus"]), *map(_disk, found["disks"])]
    yield "software", list(_software(found))
    yield "chosen and measured", list(_measured(found))
    yield (
        "fast paths",
        [(path["name"], f"{'on' if path['on'] else 'off'}: {path['why']}") for path in found["fast_paths"]]
        or [("unknown", "cannot be determined")],
    )
    yield (
        "optional parts",
        [
            (
                part["name"],
                "installed"
                if part["installed"]
                else f"lacks {', '.join(part['missing'])}: {part['install']}",
            )
            for part in found["optional"]
        ]
        or [("unknown", "the package's metadata cannot be read")],
    )
    yield "caches and hub", [*map(_cache, found["caches"]), ("model hub", _hub(found["hub"]))]
    yield (
        "calibration",
        [
            (
                known["dtype"],
                f"on {known['date']}"
                + ("" if known["holds"] else ", on another processor or with other instructions"),
            )
            for known in found["calibrations"]
        ]
        or [("none", "farthing calibrate measures this machine in ten seconds")],
    )


def _machine(machine: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "processor", f"{machine['processor'] or 'unknown'}, {machine['architecture']}"
    yield "cores", f"{_or_unknown(machine['cores'])} available to this process"
    yield (
        "instructions",
        f"{', '.join(machine['instructions'])}; {machine['instructions_used']} is in use",
    )
    total, free = machine["memory_bytes"], machine["free_memory_bytes"]
    yield "memory", f"{_gigabytes(total)}, {_gigabytes(free)} free"
    yield "system", f"{machine['system'] or 'unknown'}; {machine['python']}"


def _gpus(gpus: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for gpu in gpus:
        driver = f", driver {gpu['driver']}" if gpu["driver"] else ""
        yield (
            "GPU",
            f"{gpu['name']}, {_gigabytes(gpu['memory_bytes'])}, "
            f"compute capability {gpu['compute_capability']}{driver}",
        )
    if not gpus:
        yield "GPU", "none found"


def _disk(disk: dict[str, Any]) -> tuple[str, str]:
    warning = "" if disk["writable"] else ", NOT writable"
    return (
        f"disk of {disk['what']}",
        f"{disk['path'] or 'unknown'}: {_gigabytes(disk['free_bytes'])} free{warning}",
    )


def _software(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    torch = found["torch"]
    if torch is None:
        yield "torch", "cannot be loaded; install it again"
    else:
        yield "torch", f"{torch['version']}, built for {torch['build']}, {torch['gpus_usable']} GPUs usable"
        onednn = torch["onednn"] if isinstance(torch["onednn"], str) else _on(torch["onednn"])
        yield "libraries", f"oneDNN {onednn}, MKL {_on(torch['mkl'])}, OpenMP {_on(torch['openmp'])}"
        yield "threads", f"{torch['threads']}, for {torch['capability']}"
    yield from (found["settings"] or {}).items()


def _measured(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    chosen, measured = found["chosen"], found["measured"]
    yield (
        "chosen",
        f"{chosen['device']}, {chosen['dtype']}: {chosen['why']}" if chosen else "no usable device",
    )
    yield (
        "products",
        f"{_rate(measured['float32_flops'])} GFLOPS in float32, {_rate(measured['bfloat16_flops'])} in bfloat16",
    )
    yield "memory", f"{_rate(measured['bytes_per_second'])} GB/s copying"


def _cache(cache: dict[str, Any]) -> tuple[str, str]:
    if cache["path"] is None or cache["bytes"] is None:
        return cache["what"], f"{cache['path'] or 'unknown'}: cannot be read"
    least = "" if cache["whole"] else "at least "
    return cache["what"], f"{cache['path']}: {least}{bytes_(cache['bytes'])}"


def _hub(hub: dict[str, Any]) -> str:
    said = {True: "reachable", False: "not reachable", None: "not asked"}[hub["reachable"]]
    return f"{said} ({hub['why']})"


def _on(value: bool | None) -> str:
    return "on" if value else "off"


def _rate(value: float | None) -> str:
    return "unknown" if value is None else f"{value / 1e9:,.3g}"


def _gigabytes(value: int | None) -> str:
    return "unknown" if value is None else bytes_(value)


def _or_unknown(value: Any) -> str:
    return "unknown" if value is None else str(value)


COMMANDS: tuple[Callable[..., Any], ...] = (doctor,)
