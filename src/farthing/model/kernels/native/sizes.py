"""Sizes that the packed weights, the cache and the compiled code share."""

LANES = 16  # float32 values of a vector, outputs of a block, tokens of a page
TILE = 32  # outputs that are computed and finished together: two blocks, or one of gate and one of up
TILE_BYTES = 4 * TILE
GROUP = 32  # inputs that share a scale; every kind of weight pads its inputs to a multiple of it
BLOCK_BYTES = {"float32": 64, "bfloat16": 32, "int8": 17, "int4": 10}  # of 16 outputs, for each input
SPAN = 512  # tokens of an item of attention
HEADS = 4  # query heads of an item's products
PACKED = ("float32", "bfloat16", "int8", "int4")  # kinds of packed weights, by number
STORE, ADD, SILU, GELU = range(4)  # how a product's tile is finished
DOTTED = ("avx512_bf16", "amx")  # instruction sets with a product of bfloat16 pairs
CHUNK = 1 << 14  # elements of an item of the optimizer
BLOCK = 512  # entries of a row of logits whose sum sampling keeps
FLOAT32, BFLOAT16, ROUNDED = range(
    3
)  # how an updated weight is published: as such, or bfloat16's value in float32
