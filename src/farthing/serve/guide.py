"""What an answer must look like: a grammar, the end of thinking, the form of a tool call.

Grammars are llguidance's, which turns a JSON schema, a regular expression or a Lark grammar into the set of tokens that
may come next. They bind an answer and not the thinking before it.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from farthing.data.tokenizer import Tokenizer
from farthing.serve.errors import ApiError
from farthing.serve.protocol import ResponseFormat
from farthing.serve.thinking import CLOSE, OPEN
from farthing.serve.tools import JSON_STYLE

if TYPE_CHECKING:
    from llguidance import LLMatcher as Matcher

MOST_GRAMMAR_BYTES = 256_000


class Grammars:
    """Compiles grammars for one vocabulary; llguidance's own tables are built when first needed."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._built: Any = None

    @property
    def vocabulary(self) -> Any:
        """The `llguidance.LLTokenizer`."""
        with self._lock:
            if self._built is None:
                import llguidance

                text = self._tokenizer.serialized()
                stops = sorted(self._tokenizer.stop_ids) or [0]
                self._built = llguidance.LLTokenizer(text, n_vocab=self._vocab, eos_token=stops)
            return self._built

    def compiled(self, grammar: str, param: str) -> Matcher:
        """A matcher at the start of a grammar; copy it for each sample.

        Raises:
            ApiError: if the grammar is not one, too large or too complex.
        """
        import llguidance

        if len(grammar) > MOST_GRAMMAR_BYTES:
            raise ApiError(f"{param}: is longer than {MOST_GRAMMAR_BYTES:,} characters", param=param)
        matcher = llguidance.LLMatcher(self.vocabulary, grammar, log_level=0)
        first = matcher.deep_copy()
        first.compute_bitmask()  # some grammars turn out too large here only: seconds, and not the engines'
        if first.is_error():
            said = " ".join(first.get_error().split())[:300]
            raise ApiError(f"{param}: cannot be followed: {said}", param=param)
        return matcher

    def of_schema(self, schema: dict[str, Any], param: str) -> Matcher:
        """Matcher of JSON by a schema. Raises ApiError as `compiled`."""
        import llguidance

        try:
            text = json.dumps(schema)
            grammar = llguidance.LLMatcher.grammar_from_json_schema(text, overrides=JSON_STYLE)  # type: ignore[arg-type]
            return self.compiled(grammar, param)
        except (ValueError, RecursionError) as error:
            raise ApiError(f"{param}: is not a JSON schema: {str(error)[:300]}", param=param) from None

    def of_regex(self, regex: str, param: str) -> Matcher:
        """Matcher of a regular expression. Raises ApiError as `compiled`."""
        import llguidance

        return self.compiled(llguidance.LLMatcher.grammar_from_regex(regex), param)

    def of_format(self, form: ResponseFormat | None) -> Matcher | None:
        """Matcher of a request's `response_format`; None where any text will do. Raises ApiError as `compiled`."""
        if form is None:
            return None
        if form.type == "regex":
            return self.of_regex(form.regex or "", "response_format.regex")
        schema = form.schema_of_json
        return None if schema is None else self.of_schema(schema, "response_format.json_schema")


class Guide:
    """Leads one sample: a `Constraint` (`engine.constraint`).

    Args:
        opened: the prompt ends within a thought.
        thinks: the token by which the model may open a thought of its own accord.
        budget: the most tokens of thinking; then the thought is closed. None: no bound.
        grammar: of the answer, after the thinking; None for any text.
        call: a mark in free text, and the grammar of what follows it.

    Attributes:
        failed: a grammar grew too complex to be followed; the sample ends.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        *,
        opened: bool = False,
        thinks: int | None = None,
        budget: int | None = None,
        grammar: Matcher | None = None,
        call: tuple[str, Matcher] | None = None,
    ) -> None:
        self._tokenizer, self._words = tokenizer, -(-vocab_size // 32)
        self._budget, self._call = budget, call
        self._matcher = grammar.deep_copy() if grammar is not None else None
        self._thinks = None if opened else thinks  # only as the first token
        self._thinking, self._thought = False, 0
        self._forced: list[int] = []
        self._tail: list[int] = []  # last tokens, in which a mark is looked for
        self.done = self.failed = False
        if opened:
            self._think()

    def mask(self) -> np.ndarray | None:
        """Tokens that may come next: a bit each, in int32 words; None for any."""
        if self._forced:
            return _allow(np.zeros(self._words, np.int32), self._forced[0])
        if self._thinking or self._matcher is None:
            return None
        import llguidance.numpy as masks

        found = np.zeros((1, self._words), np.int32)
        masks.fill_next_token_bitmask(self._matcher, found)
        if self._matcher.is_error():
            self.done = self.failed = True
            return _allow(np.zeros(self._words, np.int32), min(self._tokenizer.stop_ids, default=0))
        return found[0] if self._thinks is None else _allow(found[0], self._thinks)

    def take(self, token: int) -> None:
        """Note a chosen token."""
        thinks, self._thinks = self._thinks, None
        self._tail = [*self._tail[-15:], token]
        if self._thinking:
            self._thought += 1
            if self._forced:
                self._forced.pop(0)
            if self._reads(CLOSE):
                self._thinking = bool(self._forced)
            elif self._thought == self._budget:
                self._forced = self._closing()
        elif token == thinks:
            self._think()
        elif self._matcher is not None:
            self._follow(token)
        elif self._call is not None and self._reads(self._call[0]):
            self._matcher = self._call[1].deep_copy()

    def _think(self) -> None:
        self._thinking = True
        if self._budget == 0:
            self._forced = self._closing()

    def _follow(self, token: int) -> None:
        assert self._matcher is not None
        self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            self.failed = self._matcher.is_error()
            self.done = self.failed or self._call is None
            self._matcher = None  # after a call, the answer is free again

    def _closing(self) -> list[int]:
        return self._tokenizer.raw_encode(f"\n{CLOSE}\n\n")

    def _reads(self, mark: str) -> bool:
        """Whether the text so far ends with a mark."""
        return "".join(map(self._tokenizer.token_text, self._tail)).rstrip().endswith(mark.strip())


def _allow(words: np.ndarray, token: int) -> np.ndarray:
    words.view(np.uint32)[token // 32] |= np.uint32(1 << (token % 32))
    return words


def thinking_token(tokenizer: Tokenizer, template: str) -> int | None:
    """The token <think>, if a model has one and its chat template speaks of thinking."""
    ids = tokenizer.raw_encode(OPEN)
    return ids[0] if len(ids) == 1 and OPEN in template else None
