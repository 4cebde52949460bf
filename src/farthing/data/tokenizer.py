"""The tokenizer of a model folder: text to tokens and back, and conversations to text.

tokenizer.json is read by the `tokenizers` library and the chat template rendered as transformers renders it (the tests
hold the two together): importing transformers would cost more time than a short chat's first answer.
"""

import copy
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farthing.base.errors import UserError
from farthing.data.template import ChatTemplate, Unrenderable, chat_template
from farthing.weights.chat_template import DEFAULT, read_templates
from farthing.weights.folder import require_tokenizer
from farthing.weights.tokenizer import SETTINGS, read_optional, read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding

Message = dict[str, Any]


def _byte_letters() -> dict[str, int]:
    """Bytes by the letter that byte-level vocabularies write for each (Radford et al., GPT-2, 2019): printable bytes
    stand for themselves, the others for the letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


_BYTES = _byte_letters()
_SENTINEL = "farthing sentinel"
_TOOLS = "tool_use"  # the name of the template for conversations with tools, where there is one


class Tokenizer:
    """The tokenizer and chat template of a model folder.

    Raises UserError when the folder has no tokenizer or a broken one.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        require_tokenizer(self.folder)
        self._templates = read_templates(self.folder, read_optional(self.folder / SETTINGS))
        self._open: dict[
            str, ChatTemplate
        ] = {}  # by text; a template's process starts while the rest is read
        if DEFAULT in self._templates:
            self._template(self._templates[DEFAULT])
        read = read_tokenizer(self.folder)
        self._tokens, self._marks = read.tokens, read.marks
        self.bos_id = self._id(self._marks.get("bos_token"))
        self.eos_id = self._id(self._marks.get("eos_token"))
        self.pad_id = self._id(self._marks.get("pad_token"))
        added = self._tokens.get_added_tokens_decoder()
        self._added = frozenset(added)
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.stop_ids = self._stop_ids()
        self.vocab_size = read.vocab_size  # ids are below it, gaps or not

    def __len__(self) -> int:
        """Number of tokens, added ones included; the ids may have gaps, and the model's vocabulary may be padded."""
        return self._tokens.get_vocab_size(with_added_tokens=True)

    def with_template(self, text: str) -> "Tokenizer":
        """The same tokenizer with this chat template alone."""
        made = copy.copy(self)
        made._templates, made._open = {DEFAULT: text}, {}
        made.stop_ids = made._stop_ids()
        return made

    @property
    def templates(self) -> dict[str, str]:
        """The text of each chat template by its name; empty for most base models."""
        return dict(self._templates)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The tokens on which generation stops, as they are written in text."""
        return tuple(map(self.token_text, sorted(self.stop_ids)))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The special tokens, as they are written in text."""
        return tuple(map(self.token_text, sorted(self.special_ids)))

    def token_text(self, token_id: int) -> str:
        """A token as it is written in text, also a special one."""
        return self._tokens.decode([token_id], skip_special_tokens=False)

    @property
    def has_template(self) -> bool:
        """True if the folder has a chat template; base models usually have none."""
        return bool(self._templates)

    def encode(self, text: str) -> list[int]:
        """Ids of a text on its own, with the marks (BOS) that the tokenizer puts around one."""
        return list(self._encode(text, marks=True).ids)

    def raw_encode(self, text: str) -> list[int]:
        """Ids of exactly this text, nothing added; special tokens written in it count as such."""
        return list(self._encode(text, marks=False).ids)

    def offset_encode(self, text: str, marks: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """`raw_encode`, or `encode` with `marks`; plus the character range [start, end) of the text for each id."""
        encoded = self._encode(text, marks)
        return list(encoded.ids), list(encoded.offsets)

    def text_encoder(self) -> Callable[[list[str]], list[list[int]]]:
        """A function that encodes many documents at once, each with the marks (BOS) the tokenizer puts around one.

        Unlike in `encode`, a special token written in a text is text: a document cannot end itself.
        """
        tokens = copy.deepcopy(self._tokens)
        tokens.encode_special_tokens = True
        return lambda texts: [list(encoded.ids) for encoded in tokens.encode_batch(texts)]

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes: of a part of a character too, which is no text."""
        piece = self._tokens.id_to_token(token_id)
        if piece is None:  # a gap, or the vocabulary's padding
            return b""
        if token_id in self._added:
            return piece.encode()
        if all(character in _BYTES for character in piece):
            return bytes(_BYTES[character] for character in piece)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included."""
        return self._tokens.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def marks(self) -> dict[str, str]:
        """Texts of the marks by name: `bos_token`, `eos_token`, `pad_token`, ..."""
        return dict(self._marks)

    def serialized(self) -> str:
        """The text of a tokenizer.json that says the same."""
        return self._tokens.to_str()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokens.decode([int(i) for i in ids], skip_special_tokens=True)

    def render(
        self, messages: Sequence[Message], /, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """Render a conversation by the folder's chat template, as the model was trained to read it.

        `messages` are {"role", "content"}; `add_generation_prompt` opens the assistant's turn; further
        keywords go to the template (`tools`, `enable_thinking`). Raises UserError when there is no template
        or it refuses.
        """
        return self.render_marked(messages, add_generation_prompt, **template_kwargs)[0]

    def render_marked(
        self, messages: Sequence[Message], /, add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> tuple[str, list[tuple[int, int]] | None]:
        """`render`, and the ranges that the template marks as generated; None if it has no such marks."""
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(
                    f"a message must look like {{'role': 'user', 'content': '...'}}, not {message!r}"
                )
        given = {"tools": None, "documents": None, **self._marks, **template_kwargs}
        template = self._template(self._template_for(given))
        try:
            return template.marked(
                {"messages": list(messages), **given, "add_generation_prompt": add_generation_prompt}
            )
        except Unrenderable as error:
            raise Unrenderable(
                f"the chat template of {self.folder} {error}; give the model another"
            ) from None
        except UserError as error:
            raise UserError(f"the chat template of {self.folder} {error}") from None

    def chat_ids(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Ids of the rendered conversation, the assistant's turn opened. The template writes BOS; no second
        is added.
        """
        return self.raw_encode(self.render(messages, **template_kwargs))

    def _encode(self, text: str, marks: bool) -> "Encoding":
        try:
            return self._tokens.encode(text, add_special_tokens=marks)
        except (TypeError, UnicodeEncodeError):
            raise UserError(
                f"{text[:40]!r} cannot be read: a text is characters, and none of them half a one (a lone surrogate)"
            ) from None

    def _template(self, text: str) -> ChatTemplate:
        if text not in self._open:
            self._open[text] = chat_template(text)
        return self._open[text]

    def _template_for(self, variables: dict[str, Any]) -> str:
        """The text of the template for a conversation with these variables."""
        if not self._templates:
            raise UserError(
                f"{self.folder} has no chat template, as base models have none; use an instruct model"
            )
        if variables["tools"] is not None and _TOOLS in self._templates:
            return self._templates[_TOOLS]
        if DEFAULT not in self._templates:
            raise UserError(
                f"{self.folder} has chat templates named {', '.join(sorted(self._templates))}, but none named {DEFAULT}"
            )
        return self._templates[DEFAULT]

    def _id(self, token: str | None) -> int | None:
        return self._tokens.token_to_id(token) if token is not None else None

    def _stop_ids(self) -> frozenset[int]:
        stops: set[int] = set() if self.eos_id is None else {self.eos_id}
        for name in ("generation_config.json", "config.json"):
            given = read_optional(self.folder / name).get("eos_token_id")
            stops.update(i for i in (given if isinstance(given, list) else [given]) if type(i) is int)
        return frozenset(stops | self._turn_end())

    def _turn_end(self) -> set[int]:
        """The special token that the template writes after an answer, whatever its name."""
        if DEFAULT not in self._templates:
            return set()
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            tail = self.render(turns, add_generation_prompt=False).rpartition(_SENTINEL)[2].lstrip()
        except Unrenderable:
            raise
        except UserError:  # a template with other roles or shapes of content: the configs' ids must do
            return set()
        first = self.raw_encode(tail)[:1]
        return {i for i in first if i in self.special_ids and i != self.bos_id}


class StreamDecoder:
    """Decodes ids one at a time, for showing an answer while it is made.

    What `push` returns, and `flush` at the end, joined, is `tokenizer.decode` of all the ids (as
    long as they spell valid UTF-8: decoders differ in how many U+FFFD they make of a bad byte). No piece ends
    in a part of a character, whose remaining bytes come with later tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece given out and what came after it
        self._shown = (
            0  # how many of them have been given out; kept because decoders trim the first token's space
        )

    def push(self, token_id: int) -> str:
        """The text that is now complete, possibly empty."""
        if token_id in self._tokenizer.special_ids:
            return ""
        self._ids.append(token_id)
        text = self._pending()
        if not text or text.endswith("\ufffd"):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return text

    def flush(self) -> str:
        """The rest at the end of the answer; bytes that never became a character turn into U+FFFD."""
        text = self._pending()
        self._ids, self._shown = [], 0
        return text

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]


def question_ids(tokenizer: Tokenizer, question: str, prompt: str, system: str | None) -> list[int]:
    """Ids of one question, the answer's turn opened: by the chat template, or as plain text if the model has none.

    Args:
        prompt: the user's message, in which `{question}` is replaced. (Not str.format: questions contain braces.)
    """
    text = prompt.replace("{question}", question)
    if not tokenizer.has_template:
        return tokenizer.encode(f"{system}\n{text}" if system else text)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.chat_ids([*messages, {"role": "user", "content": text}])
