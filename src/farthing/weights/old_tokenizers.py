"""Tokenizers of older kinds, converted to what tokenizer.json holds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def convert(folder: Path, settings: dict[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder without tokenizer.json, and its marks where only transformers knows them."""
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokens: Tokenizer = theirs.backend_tokenizer
    except Exception as error:  # the remedy is the same whatever goes wrong in a conversion
        raise UserError(
            f"{folder} has no tokenizer.json and its old tokenizer cannot be converted ({error})"
        ) from None
    marks = {name: getattr(theirs, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    return tokens, {name: value for name, value in marks.items() if isinstance(value, str)}
