"""OpenAI's operations over HTTP."""
