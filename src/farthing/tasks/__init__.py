"""Verifiable problems and their verifiers. Model output is never executed."""

from farthing.tasks.audit import audit
from farthing.tasks.extract import extract
from farthing.tasks.gym import Task, load_task
from farthing.tasks.item import Item, Verdict
from farthing.tasks.mixture import Mixture, Stream, question_key
from farthing.tasks.pool import VerifierPool
from farthing.tasks.verify import verify

__all__ = [
    "Item",
    "Mixture",
    "Stream",
    "Task",
    "Verdict",
    "VerifierPool",
    "audit",
    "extract",
    "load_task",
    "question_key",
    "verify",
]
