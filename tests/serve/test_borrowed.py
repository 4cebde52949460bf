"""Other people's tests of such a server, fetched from PyPI and not kept, run on ours: docs/serve-conformance.md."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

OPENAI = "openai==3.57.0"
OPENAI_NEEDS = (
    "pytest", "pytest-asyncio", "pytest-xdist", "inline-snapshot", "dirty-equals", "nest_asyncio", "aiohttp", "httpx2",
)  # fmt: skip
LLAMA = "llama-cpp-python==0.3.36"
LLAMA_NEEDS = ("pytest", "openai", "requests", "wget", "filelock", "numpy", "aiohttp", "prometheus-client")
# Its tests that ask for no words of its own model, and no routes and fields of its own.
LLAMA_KEPT = (
    "unit/test_basic.py::test_server_start_simple",
    "unit/test_chat_completion.py::test_chat_template_continue_final_message_mutual_exclusion",
    "unit/test_chat_completion.py::test_completion_with_response_format",
    "unit/test_chat_completion.py::test_invalid_chat_completion_req",
    "unit/test_chat_completion.py::test_logit_bias",
    "unit/test_chat_completion.py::test_logprobs",
    "unit/test_completion.py::test_json_prompt_mtm_error_when_not_supported",
    "unit/test_tokenize.py::test_tokenize_detokenize",
)
LLAMA_KEY = "sk-this-is-the-secret-key"
LLAMA_KEPT_WITH_A_KEY = (
    "unit/test_security.py::test_access_public_endpoint",
    "unit/test_security.py::test_incorrect_api_key",
    "unit/test_security.py::test_openai_library_correct_api_key",
)
NOT_AN_ERROR_HERE = "messages7"  # two turns of the assistant at the end
OPERATIONS = {
    "/chat/completions": "post", "/completions": "post", "/models": "get", "/models/{model}": "get",
    "/responses": "post",
}  # fmt: skip


def ran(command: list[str | Path], **options: Any) -> str:
    """What a command says, however it ends."""
    options["env"] = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | options.get("env", {})
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, **options)
    return done.stdout + done.stderr


def fetched(what: str, folder: Path) -> Path:
    """The unpacked sdist of a package."""
    name = what.partition("==")[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-binary",
        name,
        what,
        "-d",
        folder,
    ]
    said = ran(command)
    archives = list(folder.glob("*.tar.gz"))
    if not archives:
        pytest.skip(f"PyPI has not given {what}: {said[-300:]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def python_with(folder: Path, *needs: str) -> Path:
    """The interpreter of a new environment with these packages; what they need and is here already is taken from
    here."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *needs]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=1200)
    if done.returncode:
        pytest.skip(f"PyPI has not given {', '.join(needs)}: {done.stderr[-300:]}")
    return python


def passed(said: str) -> int:
    """How many tests passed, when none failed."""
    assert not re.search(r"\d+ (failed|error)", said), said[-6000:]
    found = re.search(r"(\d+) passed", said)
    assert found, said[-3000:]
    return int(found[1])


def test_openais_own_tests_of_its_client(
    start_server: Callable[..., Any], roomy_model: Path, tmp_path: Path
) -> None:
    source = fetched(OPENAI, tmp_path)
    python = python_with(tmp_path / "venv", OPENAI, *OPENAI_NEEDS)
    server = start_server(f"tiny={roomy_model}", "--lenient", key="My API Key")
    counts = {}
    for name in ("chat/test_completions", "test_completions", "test_models", "test_responses"):
        said = ran(
            [python, "-m", "pytest", "-q", "-n0", f"tests/api_resources/{name}.py", "-k", "create or test_models"],
            cwd=source, env={"TEST_API_BASE_URL": f"{server.url}/v1"},
        )  # fmt: skip
        counts[name] = passed(said)
    print(counts)
    assert counts == {
        "chat/test_completions": 40,
        "test_completions": 40,
        "test_models": 55,
        "test_responses": 40,
    }
    server.kill()


def test_llama_cpps_tests_of_its_server(
    start_server: Callable[..., Any], roomy_model: Path, tmp_path: Path
) -> None:
    source = fetched(LLAMA, tmp_path) / "vendor/llama.cpp/tools/server/tests"
    python = python_with(tmp_path / "venv", *LLAMA_NEEDS)

    def run(kept: tuple[str, ...], **options: Any) -> int:
        server = start_server(f"tiny={roomy_model}", "--lenient", **options)
        said = ran(
            [python, "-m", "pytest", "-q", *kept, "--deselect", f"{LLAMA_KEPT[3]}[{NOT_AN_ERROR_HERE}]"],
            cwd=source, env={"DEBUG_EXTERNAL": "1", "PORT": str(server.port)},
        )  # fmt: skip
        server.kill()
        return passed(said)

    assert run(LLAMA_KEPT) == 21
    assert run(LLAMA_KEPT_WITH_A_KEY, key=LLAMA_KEY) == 4


def test_requests_drawn_from_openais_description(
    start_server: Callable[..., Any], roomy_model: Path, tmp_path: Path
) -> None:
    """OPENAI_OPENAPI names openapi.json of github.com/openai/openai-openapi."""
    given = os.environ.get("OPENAI_OPENAPI")
    if not given:
        pytest.skip("OPENAI_OPENAPI=FILE names OpenAI's openapi.json")
    described = json.loads(Path(given).read_text())
    described["paths"] = {
        path: {method: described["paths"][path][method]} for path, method in OPERATIONS.items()
    }
    (tmp_path / "ours.json").write_text(json.dumps(described))
    server = start_server(f"tiny={roomy_model}", "--lenient")
    said = ran(
        [
            Path(sys.executable).with_name("st"), "run", "ours.json", "--url", f"{server.url}/v1", "--checks",
            "response_schema_conformance,not_a_server_error,content_type_conformance", "--mode", "positive",
            "--max-examples", "60", "--phases", "fuzzing", "--generation-deterministic", "--request-timeout", "120",
        ],
        cwd=tmp_path,
    )  # fmt: skip
    server.kill()
    assert "No issues found" in said, said[-6000:]
    assert "300 generated, 300 passed" in said, said[-3000:]


# ---- clients whose packages do not go with ours ----

LITELLM = """
import sys, litellm
asked = {"model": "openai/tiny", "api_base": sys.argv[1], "api_key": "none", "max_tokens": 8, "temperature": 0,
         "messages": [{"role": "user", "content": "6 - 4 ="}]}
whole = litellm.completion(**asked)
streamed = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
assert text == whole.choices[0].message.content and text, (text, whole)
assert whole.usage.prompt_tokens > 0
try:
    litellm.completion(**{**asked, "model": "openai/unheard-of"})
except litellm.NotFoundError:
    print("all well")
"""


def test_litellm(server: Any, tmp_path: Path) -> None:
    python = python_with(tmp_path / "venv", "litellm")
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    said = ran([python, "-c", LITELLM, f"{server.url}/v1"], env=offline)
    assert "all well" in said.splitlines(), said[-3000:]


def test_guidellm(server: Any, roomy_model: Path, tmp_path: Path) -> None:
    python = python_with(tmp_path / "venv", "guidellm==0.8.1")
    said = ran(
        [
            python.with_name("guidellm"), "run", "--backend", f"kind=openai_http,target={server.url},model=tiny",
            "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=24",
            "--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=24",
            "--tokenizer", f"kind=huggingface_auto,model={roomy_model}",
            "--output", f"kind=json,path={tmp_path / 'report.json'}", "--disable-console-interactive",
        ],
    )  # fmt: skip
    assert (tmp_path / "report.json").is_file(), said[-3000:]
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    assert metrics["request_totals"] == {"successful": 24, "errored": 0, "incomplete": 0, "total": 24}
    assert metrics["output_token_count"]["successful"]["total_sum"] == 24 * 24  # ignore_eos is obeyed
