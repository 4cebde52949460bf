"""Where people meet a model."""
