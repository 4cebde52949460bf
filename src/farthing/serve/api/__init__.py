"""OpenAI's operations over HTTP."""

from __future__ import annotations

import secrets
import time
from typing import Any

from farthing.serve.protocol import FINGERPRINT


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """What an answer's object begins with: an id of its own after `prefix`, its kind, the time and the model."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": FINGERPRINT,
    }
