"""What moderation reads of a request."""

import pytest

from farthing.serve.protocol import ChatRequest

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "bad"}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "bad"}}
ASKED = {"role": "user", "content": "go on"}


@pytest.mark.parametrize(
    "given",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "bad"}]}]},
        {"messages": [{"role": "system", "content": "bad"}, ASKED]},
        {"messages": [ASKED, {"role": "assistant", "content": "bad"}], "continue_final_message": True},
        {"messages": [{"role": "assistant", "tool_calls": [CALL]}, ASKED]},
        {"messages": [ASKED], "tools": [TOOL]},
    ],
)
def test_everything_that_a_client_says_is_judged(given: dict[str, object]) -> None:
    assert "bad" in ChatRequest.model_validate(given).said
