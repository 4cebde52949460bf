"""Training: the loop, optimizers, losses and checkpoints, and the steps of language modelling and GRPO."""
