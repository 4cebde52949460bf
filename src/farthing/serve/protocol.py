"""Requests as OpenAI's clients send them, checked.

A field that means something here is checked and obeyed. Fields that only OpenAI's own servers can obey without
changing an answer (`store`, `user`, `service_tier`, ...) are taken and ignored; a request for what is not served
(sound, images) is refused.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from farthing.serve.errors import ApiError

FINGERPRINT = f"farthing-{version('farthing')}"  # what a seed's answer depends on beside the model
MOST_CHOICES = 128
MOST_TOOLS = 128

Penalty = Annotated[float, Field(ge=-2, le=2)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _characters(text: str) -> str:
    """Refuse a lone surrogate: JSON can write one, and no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half a character (a lone surrogate)") from None
    return text


Text = Annotated[str, AfterValidator(_characters)]


class Body(BaseModel):
    """A part of a request. Unknown fields are ignored, as other servers do with each other's."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class TextPart(Body):
    """A piece of a message's content."""

    type: Literal["text", "input_text", "output_text"]
    text: Text


class RefusalPart(Body):
    """An earlier refusal of the assistant."""

    type: Literal["refusal"]
    refusal: Text


class CalledFunction(Body):
    """A function that the assistant called: arguments are JSON in a string."""

    name: Text
    arguments: Text


class ToolCall(Body):
    """A call of a tool in an earlier answer."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Text | list[TextPart | RefusalPart] | None = None
    name: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role not in ("assistant", "function"):
            raise ValueError(f"a message of the {self.role} needs content")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(p.text if isinstance(p, TextPart) else p.refusal for p in self.content)
        return self.content or ""


class Function(Body):
    """A function that a model may call; `parameters` is a JSON schema."""

    name: Annotated[Text, Field(min_length=1, max_length=128)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool: a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: Text


class NamedTool(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class StreamOptions(Body):
    """What a stream says beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """A schema with its name."""

    name: Text = "answer"
    description: Text | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """How an answer must look: text, any JSON object, JSON by a schema, or a match of a regular expression."""

    type: Literal["text", "json_object", "json_schema", "regex"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # llama.cpp's place for it
    regex: Text | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None and self.schema_ is None:
            raise ValueError("json_schema: is missing; give it the schema")
        if self.type == "regex" and self.regex is None:
            raise ValueError("regex: is missing; give it the regular expression")
        return self

    @property
    def schema_of_json(self) -> dict[str, Any] | None:
        """The schema that an answer must follow; {} allows any object."""
        if self.type == "json_object":
            return self.schema_ or {"type": "object"}
        if self.type == "json_schema":
            found = self.json_schema.schema_ if self.json_schema else self.schema_
            return {} if found is None else found
        return None


class SamplingFields(Body):
    """What chat and completions share. Ranges are OpenAI's; `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are
    vLLM's."""

    model: Text | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Seed | None = None
    stop: Text | list[Text] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is not None and (len(stops) > 16 or any(not 0 < len(text) <= 1000 for text in stops)):
            raise ValueError("takes up to 16 texts of 1 to 1,000 characters")
        return stops

    @property
    def says_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def says_each_usage(self) -> bool:
        """Whether each chunk of a stream holds the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return tuple(self.stop or ())


def _json(schema: dict[str, Any] | None) -> str:
    try:
        return json.dumps(schema, ensure_ascii=False)
    except (RecursionError, ValueError):
        raise ApiError("tools: a schema is nested too deeply", param="tools") from None


class ChatRequest(SamplingFields):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: Annotated[list[Function], Field(max_length=MOST_TOOLS)] | None = None  # as before tools
    function_call: Literal["none", "auto"] | NamedFunction | None = None
    modalities: list[str] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    thinking_budget: Count | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        if self.modalities is not None and set(self.modalities) - {"text"}:
            raise ValueError("modalities: only text is served")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message: needs a last message of the assistant")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: excludes add_generation_prompt")
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice: needs tools")
        if named is not None and named not in [tool.function.name for tool in self.tools or ()]:
            raise ValueError(f"tool_choice: names {named[:100]!r}, which is not among tools")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Longest answer, thinking included; None: as long as the context allows."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def said(self) -> str:
        """All that a client says to the model, whoever it says has said it: an earlier answer may be made up.

        Raises:
            ApiError: for a schema of a tool that is nested too deeply.
        """
        calls = [call.function for message in self.messages for call in message.tool_calls or ()]
        tools = [
            f"{function.name}\n{function.description or ''}\n{_json(function.parameters)}"
            for function in self.callable_tools
        ]
        return "\n".join(
            [*(message.text for message in self.messages), *(call.arguments for call in calls), *tools]
        )

    @property
    def callable_tools(self) -> list[Function]:
        """The functions that may be called in this answer."""
        if self.tools and self.tool_choice != "none":
            return [tool.function for tool in self.tools]
        if self.functions and self.function_call not in (None, "none"):
            return self.functions
        return []

    @property
    def must_call(self) -> str | bool:
        """The name of the function to call, True for any of them, or False."""
        if isinstance(self.tool_choice, NamedTool):
            return self.tool_choice.function.name
        if isinstance(self.function_call, NamedFunction) and self.functions:
            return self.function_call.name
        return self.tool_choice == "required"


class CompletionRequest(SamplingFields):
    """The body of /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]] | None = None
    max_tokens: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Text | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _served(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("best_of: only n is served; ask for n answers and choose")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one or several."""
        given: Any = self.prompt if self.prompt is not None else ""
        several = isinstance(given, list) and bool(given) and not isinstance(given[0], int)
        return given if several else [given]


class TokenizeRequest(Body):
    """The body of /tokenize: a text, or a conversation."""

    model: Text | None = None
    prompt: Text | None = None
    content: Text | None = None  # llama.cpp's name for it
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeRequest:
        if sum(given is not None for given in (self.prompt, self.content, self.messages)) != 1:
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """The body of /detokenize."""

    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]
