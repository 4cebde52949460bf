"""Questions as a model sees them."""

from __future__ import annotations

from farthing.data.tokenizer import Tokenizer


def question_ids(tokenizer: Tokenizer, question: str, prompt: str, system: str | None) -> list[int]:
    """Ids of one question, the answer's turn opened: by the chat template, or as plain text if the model has none.

    Args:
        prompt: what the user says; `{question}` in it stands for the question. (Not str.format: questions hold braces.)
    """
    text = prompt.replace("{question}", question)
    if not tokenizer.has_template:
        return tokenizer.encode(f"{system}\n{text}" if system else text)
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.chat_ids([*messages, {"role": "user", "content": text}])
