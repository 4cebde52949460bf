"""How numba compiles everything here: for callers that are compiled too, without exceptions, free to reorder sums."""

from __future__ import annotations

from functools import partial

from numba import njit

# Sums may be split over lanes, and products joined with sums. Infinities and NaN keep their meaning.
kernel = partial(
    njit,
    error_model="numpy",
    fastmath={"reassoc", "contract", "nsz", "arcp"},
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)
function = kernel()
