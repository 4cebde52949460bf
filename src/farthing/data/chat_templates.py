"""Chat templates of our own, for models that have none or are to have another."""

from __future__ import annotations

from importlib.resources import files

from farthing.base.errors import UserError
from farthing.base.limits import named
from farthing.data.tokenizer import Tokenizer
from farthing.recipe.types import TEMPLATES


def template_text(chosen: str, tokenizer: Tokenizer) -> str:
    """The text of a template by its name or the path of its file.

    One of ours begins with BOS if the tokenizer puts it before texts, since nothing is put before a rendered
    conversation.

    Raises:
        UserError: for a file that does not exist or is no text.
    """
    if chosen in TEMPLATES:
        text = (files("farthing.data") / "templates" / f"{chosen}.jinja").read_text(encoding="utf-8")
        begins = tokenizer.bos_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_id]
        return "{{- bos_token -}}\n" + text if begins else text
    path = named(chosen)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(
            f"chat_template: {chosen} cannot be read ({why}); give {' or '.join(TEMPLATES)}, or the path of a template"
        ) from None
