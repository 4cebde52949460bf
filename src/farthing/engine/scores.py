"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from farthing.engine.sampling import top_logprobs
from farthing.engine.sequence import Prompt
from farthing.model import Decoder

ROWS = 64  # tokens whose logits exist at a time: 2,000 times a vocabulary of 150,000 would take over 1 GB


def score_prompt(decoder: Decoder, prompt: Prompt, hidden_NC: Tensor) -> int:
    """Note the log-probabilities, at temperature 1, of the tokens after those that a pass has read.

    Args:
        hidden_NC: the final norm's output for these.

    Returns:
        The number of tokens scored.
    """
    job, count = prompt.job, prompt.job.request.sampling.top_logprobs
    if prompt.read == 0:
        job.prompt_logprobs[:], job.prompt_top[:] = [None], [[]]
    after = torch.tensor(prompt.ids[prompt.read + 1 : prompt.end + 1], device=hidden_NC.device)
    for hidden, ids in zip(hidden_NC[: len(after)].split(ROWS), after.split(ROWS), strict=True):
        logits = decoder.logits(hidden)
        total = logits.logsumexp(-1)
        job.prompt_logprobs += (logits.gather(1, ids[:, None])[:, 0] - total).tolist()
        job.prompt_top += top_logprobs(logits, total, [count] * len(ids))
    return len(after)
