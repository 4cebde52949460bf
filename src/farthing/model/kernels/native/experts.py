"""DeepSeek-V3's gate (arXiv:2412.19437 section 2.1.2) for a few rows, and which rows each expert works on."""

from __future__ import annotations

import math

from farthing.model.kernels.native.jit import function
from farthing.model.kernels.native.memory import as_float, fields, read_f32, read_i64, write_f32, write_i64

TAKEN = -1e30


@function
def largest_two(scores: int, start: int, count: int) -> tuple[float, float]:
    best, second = TAKEN, TAKEN
    for i in range(start, start + count):
        score = read_f32(scores + 4 * i)
        if score > best:
            best, second = score, best
        elif score > second:
            second = score
    return best, second


@function
def route(op: int, row: int, scratch: int) -> None:
    """Choose a row's experts by score plus correction, within the best groups, and compute their gates.

    `scratch` takes two rows: scores, and scores to choose by.
    """
    (_, logits, pitch, experts, top_k, groups, top_groups, softmax, normalise, scale, logit_bias, bias, chosen,
     gates) = fields(op, 14)  # fmt: skip
    source, scores, choice = logits + row * pitch, scratch, scratch + 4 * experts
    most = TAKEN
    for e in range(experts):
        logit = read_f32(source + 4 * e) + (read_f32(logit_bias + 4 * e) if logit_bias else 0.0)
        write_f32(scores + 4 * e, logit)
        most = max(most, logit)
    total = 0.0
    for e in range(experts):
        logit = read_f32(scores + 4 * e)
        score = math.exp(logit - most) if softmax else 1.0 / (1.0 + math.exp(-logit))
        write_f32(scores + 4 * e, score)
        total += score
    for e in range(experts):
        score = read_f32(scores + 4 * e)
        if softmax:
            score /= total
            write_f32(scores + 4 * e, score)
        write_f32(choice + 4 * e, score + (read_f32(bias + 4 * e) if bias else 0.0))
    if groups > 1:
        leave_groups(choice, experts // groups, groups, top_groups, bias != 0, scratch + 8 * experts)
    gate_sum = 0.0
    for k in range(top_k):
        best = 0
        for e in range(1, experts):
            if read_f32(choice + 4 * e) > read_f32(choice + 4 * best):
                best = e
        write_f32(choice + 4 * best, 2 * TAKEN)
        write_i64(chosen + 8 * (row * top_k + k), best)
        gate = read_f32(scores + 4 * best)
        write_f32(gates + 4 * (row * top_k + k), gate)
        gate_sum += gate
    factor = as_float(scale) / ((gate_sum + 1e-20) if normalise else 1.0)
    for k in range(top_k):
        place = gates + 4 * (row * top_k + k)
        write_f32(place, read_f32(place) * factor)


@function
def leave_groups(choice: int, size: int, groups: int, keep: int, by_two: bool, scores: int) -> None:
    """Take all but the best groups out of the choice: by the sum of a group's best two scores (V3) or its best (V2)."""
    for group in range(groups):
        best, second = largest_two(choice, group * size, size)
        write_f32(scores + 4 * group, best + second if by_two else best)
    for group in range(groups):
        score, better = read_f32(scores + 4 * group), 0
        for other in range(groups):
            rival = read_f32(scores + 4 * other)
            if rival > score or (rival == score and other < group):
                better += 1
        if better >= keep:
            for e in range(group * size, (group + 1) * size):
                write_f32(choice + 4 * e, TAKEN)


@function
def assign(op: int, rows: int) -> None:
    """Sort the chosen (row, k) places by expert: `members` holds where each expert's places start and, last, end; the
    word before it is the address of the places."""
    _, chosen, experts, top_k, members = fields(op, 5)
    places = read_i64(members - 8)
    for e in range(experts + 1):
        write_i64(members + 8 * e, 0)
    for place in range(rows * top_k):
        e = members + 8 * (read_i64(chosen + 8 * place) + 1)
        write_i64(e, read_i64(e) + 1)
    for e in range(experts):
        write_i64(members + 8 * (e + 1), read_i64(members + 8 * (e + 1)) + read_i64(members + 8 * e))
    for place in range(rows * top_k - 1, -1, -1):
        # the last place of an expert is the one before the next expert's first; its end moves down as places fill
        e = members + 8 * (read_i64(chosen + 8 * place) + 1)
        write_i64(e, read_i64(e) - 1)
        write_i64(places + 8 * read_i64(e), place)
    # every end has moved down to its expert's start: shift them into place
    for e in range(experts):
        write_i64(members + 8 * e, read_i64(members + 8 * (e + 1)))
    write_i64(members + 8 * experts, rows * top_k)
