"""Training: the shared loop, optimizers, losses and checkpoints, and one module for each stage."""
