"""Reward models: sequence classifiers with one label, as transformers and TRL write them.

A reward model is a decoder whose head is one row, `score.weight`. The score of a text is the head's product with the
last hidden state: no probability, and of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.weights.folder import read_config

_CLASSIFIER = "ForSequenceClassification"
_LABELS = 2  # of a config.json that says nothing, in transformers


def reward_config(folder: Path) -> dict[str, Any]:
    """config.json of a reward model's folder. Raises UserError for one of any other model, or none."""
    hf = read_config(folder)
    if not is_reward_model(hf):
        raise UserError(
            f"{folder} is no reward model: its architecture is {_architecture(hf) or 'not said'}; give a folder of "
            f"transformers' {_CLASSIFIER} with one label"
        )
    if (labels := _labels(hf)) != 1:
        raise UserError(
            f"{folder} is a classifier with {labels} labels, and a reward is one number; give one with num_labels 1"
        )
    return hf


def is_reward_model(hf: Mapping[str, Any]) -> bool:
    """Whether a config.json is a classifier's."""
    return _architecture(hf).endswith(_CLASSIFIER)


def _architecture(hf: Mapping[str, Any]) -> str:
    named = hf.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _labels(hf: Mapping[str, Any]) -> object:
    if isinstance(hf.get("id2label"), dict):
        return len(hf["id2label"])
    return hf.get("num_labels", _LABELS)
