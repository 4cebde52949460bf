"""What the process of a template and the one that asks it agree on: limits, and how a message is sent.

A message is its length in 8 bytes, then JSON.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

SECONDS = 5.0  # of processor time, to compile or to render once
MEMORY = 2**30  # bytes of address space
CHARACTERS = 16_000_000  # of one rendered conversation
_LENGTH = struct.Struct(">Q")


def read(stream: BinaryIO, most: int | None) -> bytes | None:
    """The next message, of at most `most` bytes; None if the stream has ended or the message is longer."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    if most is not None and length > most:
        return None
    body = stream.read(length)
    return body if len(body) == length else None


def write(stream: BinaryIO, body: bytes) -> None:
    """Send a message. Raises BrokenPipeError when nobody reads."""
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()
