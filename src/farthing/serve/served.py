"""A model that is served: what its answers need to know of its tokenizer and template, and its network and engine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.cost.meter import Span, book_sampling
from farthing.data.tokenizer import Tokenizer
from farthing.engine.model import Model
from farthing.serve.errors import ApiError, too_long
from farthing.serve.guide import Grammars, thinking_token
from farthing.serve.protocol import ChatRequest, Function, Message
from farthing.serve.safety import Policy
from farthing.serve.thinking import opens_thinking
from farthing.serve.tools import Form, described, form_of, told
from farthing.weights.chat_template import DEFAULT
from farthing.weights.tokenizer import read_optional

PREFILL_TOKENS = 256  # prompt tokens between two tokens of running answers
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class Prompt:
    """A conversation as the network reads it.

    Attributes:
        opened: it ends within a thought.
    """

    ids: list[int]
    opened: bool = False


class Spoken:
    """One model of a server by its tokenizer and chat template, whatever runs it.

    Args:
        name: by which clients ask for it.
        context: the most tokens of prompt and answer.
    """

    def __init__(self, name: str, folder: Path, tokenizer: Tokenizer, context: int, vocab_size: int) -> None:
        self.name, self.created = name, int(time.time())
        self._folder, self.tokenizer, self.context, self.vocab_size = folder, tokenizer, context, vocab_size
        self.template = tokenizer.templates.get(DEFAULT, "")
        self.form: Form = form_of(self.template)
        self.defaults = _defaults(folder)

    def book(self, span: Span) -> None:
        """Add what has been done since the last call to a span. Call it where the engine runs."""
        raise NotImplementedError

    @cached_property
    def special(self) -> dict[str, int]:
        """Special tokens by their text."""
        return {self.tokenizer.token_text(token): token for token in self.tokenizer.special_ids}

    @property
    def card(self) -> dict[str, Any]:
        """The model in OpenAI's list of models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "farthing",
            "max_model_len": self.context,
        }

    def chat_prompt(self, body: ChatRequest, policy: Policy | None = None) -> Prompt:
        """The prompt of a conversation, behind the operator's policy.

        Raises:
            ApiError: if the model has no chat template, or it refuses the conversation.
        """
        functions = body.callable_tools
        extra: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if reserved := sorted({"messages", "add_generation_prompt", "tools"} & set(extra)):
            param = f"chat_template_kwargs.{reserved[0]}"
            raise ApiError(f"{param}: is set by a field of its own", param=param)
        if body.reasoning_effort is not None:
            extra.setdefault("enable_thinking", body.reasoning_effort != "none")
            extra.setdefault("reasoning_effort", body.reasoning_effort)
        messages = [_turn(message) for message in body.messages]
        if policy is not None:
            messages = policy.before(messages)
        if functions and self._knows_tools:
            extra["tools"] = [described(function) for function in functions]
        elif functions:
            messages = _with_tools(messages, functions)
        adds = body.add_generation_prompt if body.add_generation_prompt is not None else True
        try:
            if body.continue_final_message:
                text = self._continued(messages, extra)
            else:
                text = self.tokenizer.render(messages, add_generation_prompt=adds, **extra)
            return Prompt(self.tokenizer.raw_encode(text), opens_thinking(text))
        except UserError as error:
            raise ApiError(_without_folder(str(error), self), param="messages") from None

    def _continued(self, messages: list[dict[str, Any]], extra: dict[str, Any]) -> str:
        """A conversation whose last message goes on: all that the template writes after its text is cut off."""
        last = messages[-1]["content"] or ""
        text = self.tokenizer.render(messages, add_generation_prompt=False, **extra)
        at = text.rfind(last.rstrip()) if last.strip() else -1
        if at < 0:
            return self.tokenizer.render(messages[:-1], add_generation_prompt=True, **extra) + last
        return text[:at] + last

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """Raise ApiError for a token that the model does not have."""
        for token in tokens:
            if token >= self.vocab_size:
                raise ApiError(f"{param}: {token} is not a token of {self.name}", param=param)

    @property
    def _knows_tools(self) -> bool:
        """Whether a chat template has a place for tools."""
        return "tools" in self.template or len(self.tokenizer.templates) > 1

    def room(self, prompt: Sequence[int], wanted: int | None, param: str) -> int:
        """Tokens that an answer may have: as many as wanted, or as the context leaves.

        Raises:
            ApiError: if they do not fit; nothing is cut off silently.
        """
        left = self.context - len(prompt)
        if left < 1:
            raise too_long(
                f"the prompt has {len(prompt):,} tokens, and the context of {self.name} {self.context:,}; shorten it",
                param,
            )
        if wanted is not None and wanted > left:
            raise too_long(
                f"a prompt of {len(prompt):,} tokens and {wanted:,} of answer exceed the {self.context:,} of "
                f"{self.name}'s context; ask for at most {left:,}",
                "max_tokens",
            )
        return left if wanted is None else wanted


class Served(Spoken):
    """A model with its engine.

    Args:
        max_batch: the most samples at a time.
        cache_tokens: tokens of all samples and prefixes together.
    """

    def __init__(
        self, name: str, model: Model, *, max_batch: int = 32, cache_tokens: int = 32_768, speculate: int = 0
    ) -> None:
        self.model = model
        self.engine = model.engine(
            max_batch, cache_tokens, speculate=speculate, reserve=False, prefill_tokens=PREFILL_TOKENS
        )
        config = model.decoder.config
        context = min(self.engine.capacity, config.max_positions)
        super().__init__(name, model.folder, model.tokenizer, context, config.vocab_size)
        self.grammars = Grammars(self.tokenizer, self.vocab_size)
        self.thinks = thinking_token(self.tokenizer, self.template)

    def book(self, span: Span) -> None:
        book_sampling(span, self.engine.done(), self.model.hf_config)


def _turn(message: Message) -> dict[str, Any]:
    """A message as chat templates want it. Earlier thoughts are not read again, as DeepSeek-R1 and Qwen3 ask."""
    role = {"developer": "system", "function": "tool"}.get(message.role, message.role)
    turn: dict[str, Any] = {"role": role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            turn[name] = value
    return turn


def _with_tools(messages: list[dict[str, Any]], functions: Sequence[Function]) -> list[dict[str, Any]]:
    """The conversation for a template without tools: they are told of, called and answered in plain turns."""
    plain: list[dict[str, Any]] = []
    for turn in messages:
        content = turn["content"]
        for call in turn.get("tool_calls", ()):
            function = call["function"]
            body = f'{{"name": "{function["name"]}", "arguments": {function["arguments"]}}}'
            content += f"\n<tool_call>\n{body}\n</tool_call>"
        if turn["role"] == "tool":
            turn, content = {"role": "user"}, f"<tool_response>\n{content}\n</tool_response>"
        plain.append({"role": turn["role"], "content": content.strip()})
    said = told(functions)
    if plain and plain[0]["role"] == "system":
        return [{"role": "system", "content": f"{plain[0]['content']}\n\n{said}"}, *plain[1:]]
    return [{"role": "system", "content": said}, *plain]


def _defaults(folder: Path) -> dict[str, float]:
    """Sampling parameters that the model's makers recommend; out of range, they are left out."""
    given = read_optional(folder / "generation_config.json")
    return {
        name: given[name]
        for name in _DEFAULTS
        if type(given.get(name)) in (int, float) and 0 <= given[name] <= 1000
    }


def _without_folder(said: str, served: Spoken) -> str:
    """A message without a path of this machine."""
    return said.replace(str(served._folder), served.name)
