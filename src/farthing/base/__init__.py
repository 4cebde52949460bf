"""Shared foundations: the machine, files, schemas, errors."""
