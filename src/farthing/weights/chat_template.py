"""Where a model folder keeps its chat templates. They are text here; nothing is rendered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.files import read_json, write_json

FILE, OLDER_FILE, FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
DEFAULT = "default"


def read_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Name -> text of the folder's chat templates, empty if it has none; the one for plain conversations is "default".

    Template files go before `settings`, which is tokenizer_config.json, as in transformers; chat_template.json, which
    belongs to processors of several media, is read last. Raises UserError for what is not text.
    """
    files = _files(folder)
    if files:
        return files
    found = _named(settings.get("chat_template"), folder / "tokenizer_config.json")
    if not found and (folder / OLDER_FILE).is_file():
        found = _named(read_json(folder / OLDER_FILE).get("chat_template"), folder / OLDER_FILE)
    return found


def give_template(folder: Path, text: str, stops: list[int]) -> None:
    """Give a folder that is being written this chat template alone, and the ids on which generation stops."""
    (folder / FILE).write_text(text, encoding="utf-8")
    (folder / OLDER_FILE).unlink(missing_ok=True)
    for name, changes in (("tokenizer_config.json", {}), ("generation_config.json", {"eos_token_id": stops})):
        path = folder / name
        settings = read_json(path) if path.is_file() else {}
        settings.pop("chat_template", None)
        write_json(path, settings | changes)


def as_setting(templates: dict[str, str]) -> list[dict[str, str]]:
    """The templates as tokenizer_config.json holds several."""
    return [{"name": name, "template": text} for name, text in templates.items()]


def _files(folder: Path) -> dict[str, str]:
    found = {path.stem: path for path in sorted((folder / FOLDER).glob("*.jinja"))}
    if (folder / FILE).is_file():
        found.setdefault(DEFAULT, folder / FILE)
    return {name: _text(path) for name, path in found.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; download the tokenizer again") from None


def _named(given: Any, path: Path) -> dict[str, str]:
    """The templates of a JSON value: one text, an object of texts by name, or a list of {"name", "template"}."""
    if given is None:
        return {}
    if isinstance(given, str):
        return {DEFAULT: given}
    if isinstance(given, list) and all(isinstance(entry, dict) for entry in given):
        given = {entry.get("name"): entry.get("template") for entry in given}
    texts = given if isinstance(given, dict) else {"": None}
    if not all(isinstance(name, str) and isinstance(text, str) for name, text in texts.items()):
        raise UserError(
            f"{path}: chat_template must be a text, or texts by name, not {json.dumps(given)[:60]}; download it again"
        )
    return dict(texts)
