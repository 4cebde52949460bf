"""Decoding and the optimizer compiled for this processor, without a compiler at the user's.

`vector`, `target`, `products`, `attend`, `rowwise`, `matmul`, `experts`, `draw`, `pack`, `update`, `step` are the
generator: they write LLVM's vectors through numba, and are imported only by `build`, in a process of its own.
`library`, `session`, `crew`, `operations`, `packing` run what it made. `codes` and `sizes` are what both agree on.
docs/kernels.md explains it on a page.
"""
