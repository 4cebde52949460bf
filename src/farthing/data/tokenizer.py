"""The tokenizer of a model folder: text to tokens and back, and conversations to text.

tokenizer.json is read by the `tokenizers` library and the chat template rendered here, the way transformers
does (the tests hold the two together): importing transformers would cost more time than a short chat's first
answer.
"""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from farthing.base.errors import UserError
from farthing.weights.folder import require_tokenizer
from farthing.weights.tokenizer import read_optional, read_tokenizer

Message = dict[str, Any]
_SENTINEL = "farthing sentinel"
# Exceptions of broken templates: adding text to a number, indexing beyond a list, and so on
_TEMPLATE_MISTAKES = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)


class Tokenizer:
    """The tokenizer and chat template of a model folder.

    Raises UserError when the folder has no tokenizer or a broken one.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        require_tokenizer(self.folder)
        read = read_tokenizer(self.folder)
        self._tokens, self._marks = read.tokens, read.marks
        self._template = _read_template(self.folder, read.settings)
        self.bos_id = self._id(self._marks.get("bos_token"))
        self.eos_id = self._id(self._marks.get("eos_token"))
        self.pad_id = self._id(self._marks.get("pad_token"))
        added = self._tokens.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.stop_ids = self._stop_ids()

    def __len__(self) -> int:
        """Number of ids, added tokens included; the model's vocabulary may be padded beyond it."""
        return self._tokens.get_vocab_size(with_added_tokens=True)

    @property
    def has_template(self) -> bool:
        """True if the folder has a chat template; base models usually have none."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """Ids of a text on its own, with the marks (BOS) that the tokenizer puts around one."""
        return list(self._tokens.encode(text).ids)

    def raw_encode(self, text: str) -> list[int]:
        """Ids of exactly this text, nothing added; special tokens written in it count as such."""
        return list(self._tokens.encode(text, add_special_tokens=False).ids)

    def offset_encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`raw_encode`, plus the character range [start, end) of the text for each id."""
        encoded = self._tokens.encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)

    def text_encoder(self) -> Callable[[list[str]], list[list[int]]]:
        """A function that encodes many documents at once, each with the marks (BOS) the tokenizer puts around one.

        Unlike in `encode`, a special token written in a text is text: a document cannot end itself.
        """
        tokens = copy.deepcopy(self._tokens)
        tokens.encode_special_tokens = True
        return lambda texts: [list(encoded.ids) for encoded in tokens.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without special tokens. Bytes that are not UTF-8 become U+FFFD."""
        return self._tokens.decode([int(i) for i in ids], skip_special_tokens=True)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **template_kwargs: Any
    ) -> str:
        """Render a conversation by the folder's chat template, as the model was trained to read it.

        `messages` are {"role", "content"}; `add_generation_prompt` opens the assistant's turn; further
        keywords go to the template (`tools`, `enable_thinking`). Raises UserError when there is no template
        or it refuses.
        """
        if self._template is None:
            raise UserError(
                f"{self.folder} has no chat template, as base models have none; use an instruct model"
            )
        for message in messages:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(
                    f"a message must look like {{'role': 'user', 'content': '...'}}, not {message!r}"
                )
        given = {"tools": None, "documents": None, **self._marks, **template_kwargs}
        try:
            # Through JSON, so that a template, which is untrusted, only ever holds plain values
            plain = json.loads(json.dumps({"messages": list(messages), **given}))
            return self._template.render(**plain, add_generation_prompt=add_generation_prompt)
        except (jinja2.TemplateError, *_TEMPLATE_MISTAKES) as error:
            raise UserError(
                f"the chat template of {self.folder} cannot render this conversation: {_line(error)}"
            ) from None

    def chat_ids(self, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
        """Ids of the rendered conversation, the assistant's turn opened. The template writes BOS; no second
        is added.
        """
        return self.raw_encode(self.render(messages, **template_kwargs))

    def _id(self, token: str | None) -> int | None:
        return self._tokens.token_to_id(token) if token is not None else None

    def _stop_ids(self) -> frozenset[int]:
        stops: set[int] = set() if self.eos_id is None else {self.eos_id}
        for name in ("generation_config.json", "config.json"):
            given = read_optional(self.folder / name).get("eos_token_id")
            stops.update(i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int))
        return frozenset(stops | self._turn_end())

    def _turn_end(self) -> set[int]:
        """The special token that the template writes after an answer, whatever its name."""
        if self._template is None:
            return set()
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _SENTINEL}]
        try:
            tail = self.render(turns, add_generation_prompt=False).rpartition(_SENTINEL)[2].lstrip()
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


# ---------------------------------------------------------------- reading the folder


def _read_template(folder: Path, settings: dict[str, Any]) -> jinja2.Template | None:
    path = folder / "chat_template.jinja"
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; download the tokenizer again") from None
    if isinstance(text, list):  # several by name; "default" is the one for plain conversations
        text = next(
            (t.get("template") for t in text if isinstance(t, dict) and t.get("name") == "default"), None
        )
    if not isinstance(text, str):
        return None
    try:
        return _environment().from_string(text)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template of {folder} is broken ({error}); download the tokenizer again"
        ) from None


# ---------------------------------------------------------------- templates, which are untrusted


def _environment() -> ImmutableSandboxedEnvironment:
    """A sandbox with just the filters and functions that chat templates rely on."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.clear()
    environment.globals |= {
        "range": safe_range,
        "namespace": _Namespace,
        "dict": _make_dict,
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training tools; here it only holds its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """`namespace()`, which a template writes to, without access to the names Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            _check_name(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as models were trained on it: Jinja's own filter escapes < and > for web pages."""
    allowed = {key: options[key] for key in ("separators", "sort_keys") if key in options}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)


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
