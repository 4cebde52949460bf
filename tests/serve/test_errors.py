"""What a client reads of its own mistakes."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from farthing.serve.api.responses import ResponsesRequest
from farthing.serve.errors import from_validation
from farthing.serve.protocol import ChatRequest

IMAGE = {"type": "input_image", "image_url": "data:,"}
AUDIO = {"type": "input_audio", "input_audio": {"data": ""}}


@pytest.mark.parametrize(
    ("operation", "body", "field"),
    [
        (
            ResponsesRequest,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "see"}, IMAGE]}]},
            "input.0.content.1.type",
        ),
        (ChatRequest, {"messages": [{"role": "user", "content": [AUDIO]}]}, "messages.0.content.0.type"),
        (ChatRequest, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (ChatRequest, {"messages": [{"role": "king", "content": ""}]}, "messages.0.role"),
        (ChatRequest, {"messages": "hello"}, "messages"),
    ],
)
def test_the_field_at_fault_is_the_one_that_was_meant(
    operation: type[BaseModel], body: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValidationError) as found:
        operation.model_validate(body)
    error = from_validation(found.value.errors())
    assert (error.param, error.status) == (field, 400)
    assert error.message.startswith(f"{field}: ")
