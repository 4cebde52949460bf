"""Sizes that the network computes by and the memory formula counts by. No torch, so that a plan can read them."""

LOGIT_BYTES = 256 << 20  # of float32 logits at a time; fewer chunks means fewer sums over the head's gradient
SHORT_LENGTH = 512  # tokens up to which a CPU's attention makes its weights again in the backward pass
PACKED_BYTES = 1 << 30  # of weights, up to which a sampler keeps a copy of them for oneDNN too
