"""What Python and the compiled code agree on: operations, and the words of a step's state."""

from __future__ import annotations

from enum import IntEnum

OPERATION_FIELDS = 24
OPERATION_BYTES = 8 * OPERATION_FIELDS
# A step's state is one word: the address of an operation, which is a multiple of 64, and the next of its items.
ALIGNED_BITS, ITEM_BITS = 6, 22
MOST_ITEMS = (1 << ITEM_BITS) - 1


class Code(IntEnum):
    """What an operation does."""

    END = 0
    EMBED = 1
    NORM = 2
    QUANTIZE = 3
    MULTIPLY = 4
    ROTATE = 5
    ROTATE_LATENT = 6
    ATTEND = 7
    ROUTE = 8
    ASSIGN = 9
    EXPERTS_UP = 10
    EXPERTS_DOWN = 11
    CAP = 12
    DRAW = 13
    PACK = 14
    SQUARES = 15
    ADAMW = 16


# The fields of each, in the order in which the compiled code unpacks them. Pitches and steps are bytes; a pitch lies
# between rows. `stored` is the size of an element: 2 for bfloat16, 4 for float32. Real numbers are a float64's bits.
FIELDS = {
    Code.EMBED: "stored width scale out pitch",
    Code.NORM: "x pitch groups step length width weight eps plus out out_pitch out_step",
    Code.QUANTIZE: "x pitch width out out_pitch repeats",
    Code.MULTIPLY: "kind x x_pitch x_step k w w_step stride count grain bias mode y y_pitch y_step parts",
    Code.ROTATE: "x pitch heads groups width padded cos sin keys values stored",
    Code.ROTATE_LATENT: (
        "q q_pitch q_step heads width cos sin absorbed absorbed_pitch absorbed_step latent key kv_pitch latent_width "
        "entries entry_width stored"
    ),
    Code.ATTEND: (
        "q q_pitch groups shared latent width q_step keys values page_bytes value_width stored window softcap sinks "
        "scale partial ended out out_pitch each"
    ),
    Code.ROUTE: (
        "logits pitch experts top_k groups top_groups softmax normalise scale logit_bias bias chosen gates"
    ),
    Code.ASSIGN: "chosen experts top_k members",
    Code.EXPERTS_UP: "kind x x_pitch top_k k w w_step stride count grain members y y_pitch experts",
    Code.EXPERTS_DOWN: "kind x x_pitch top_k k w w_step stride experts members gates y y_pitch count",
    Code.CAP: "x pitch width bound",
    Code.DRAW: "logits pitch entries padded",
    Code.PACK: "kind source stored outs ins inputs together target stride count",
    Code.SQUARES: "x count sums items",
    Code.ADAMW: "master gradient mean square out published count settings items",
}


def place(code: Code, name: str) -> int:
    """Bytes from the start of an operation to a field."""
    return 8 * (1 + FIELDS[code].split().index(name))


class Word(IntEnum):
    """Places in what a step's threads share, int64 each. The first two have a line of the cache each."""

    STATE = 0
    DONE = 8  # completed items of the current operation
    ROWS = 16  # new tokens
    SPANS = 17  # the most that any row's context has
    SCRATCH = 18
    SCRATCH_BYTES = 19  # of a thread
    # addresses of what a step reads, one entry a row
    IDS = 20
    POSITIONS = 21
    PAGES = 22  # the page of each row's own token
    TABLES = 23  # pages of each sequence, int64, TABLE_BYTES apart
    TABLE_BYTES = 24
    TEMPERATURES = 25
    UNIFORMS = 26
    # and of what it writes
    CHOSEN = 27
    LOGPROBS = 28
    ENTROPIES = 29
    EMBEDDING = 30  # the table as it lies now
    EXACT = 31  # rows whose products are in float32; of those that follow, x may be rounded to bfloat16


WORDS = 32
