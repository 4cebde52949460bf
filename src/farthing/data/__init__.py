"""Text and conversations in, tokens out."""
