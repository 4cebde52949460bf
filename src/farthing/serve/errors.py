"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}` and an HTTP status."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


class ApiError(Exception):
    """What a client did wrong, or what the server cannot do now.

    Args:
        param: the request's field at fault.
        retry_after: seconds after which to ask again, where that helps.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.kind = message, status, kind
        self.param, self.code, self.retry_after = param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that a client receives."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


def unknown_model(name: str, served: Sequence[str]) -> ApiError:
    """A model that is not served here."""
    return ApiError(
        f"the model {name[:200]!r} is not served here; there is {', '.join(served)}",
        status=404,
        param="model",
        code="model_not_found",
    )


def loading() -> ApiError:
    """No model answers yet."""
    return ApiError(
        "the models are being loaded", status=503, kind="overloaded_error", code="loading", retry_after=2
    )


def too_long(message: str, param: str) -> ApiError:
    """A prompt that does not fit, with the answer asked for."""
    return ApiError(message, param=param, code="context_length_exceeded")


def from_validation(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """A body that is not what the operation takes: pydantic's first finding, by the field's name.

    Of a field's forms pydantic tries each; the one that the body is meant in is the one it came furthest with.
    """
    first = max(problems, key=lambda problem: len(problem["loc"]))
    if first["type"] == "json_invalid":
        said = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(f"the body is not JSON: {said} at character {first['loc'][-1]}")
    path = [str(part) for part in first["loc"] if part != "body" and not _branch(part)]
    said = str(first["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if named := re.match(r"(\w+): ", said):  # found in the whole of a table, of which it names a field
        path.append(named[1])
        said = said[named.end() :]
    where = ".".join(path) or "body"
    return ApiError(f"{where}: {said[:1].lower()}{said[1:]}", param=where)


def _branch(part: str | int) -> bool:
    """Whether a part of pydantic's path names a branch of a union and not a field."""
    return isinstance(part, str) and (
        not part.replace("_", "a").isalnum() or part[:1].isupper() or part in _TYPES
    )


_TYPES = frozenset(("str", "int", "float", "bool", "list", "dict", "constrained-str", "constrained-int"))
