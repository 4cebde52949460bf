"""Farthing's engine as a model of lm-evaluation-harness, so that its tasks and scores are the harness's own.

The harness finds models in its registry, which this module enters when it is imported:

    python -m farthing.evaluate.lm_eval --model farthing --model_args path=FOLDER --tasks hellaswag

It needs the extra `lm-eval`.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from farthing.base.terminal import say

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    missing = f"farthing: {error}; lm-evaluation-harness needs: pip install 'farthing[lm-eval]'"
    if __name__ == "__main__":
        say(missing, sys.stderr)
        sys.exit(2)
    raise ImportError(missing) from None

from farthing.base.errors import UserError
from farthing.engine import Request, Sampling, load
from farthing.evaluate.likelihood import likelihoods
from farthing.recipe.work import EVALUATED_AT_ONCE, PROMPT_TOKENS

_IGNORED = {"do_sample", "max_length"}  # of generation; do_sample is said by the temperature


@register_model("farthing")
class Farthing(TemplateLM):
    """A model folder, or any other source of `farthing.load`, read by Farthing's network and engine.

    Args:
        path: the source; `pretrained` is the same.
        dtype, device: as of `farthing.load`.
        seed: decides every sampled token.
        max_gen_toks: longest answer where a task does not say.
    """

    def __init__(
        self,
        path: str = "",
        pretrained: str = "",
        dtype: str = "auto",
        device: str | None = None,
        seed: int = 0,
        max_gen_toks: int = 256,
        batch_size: Any = None,  # the engine batches by itself
        max_batch_size: Any = None,
    ) -> None:
        super().__init__()
        source = str(path or pretrained)
        if not source:
            raise UserError("--model farthing needs --model_args path=FOLDER")
        if device and "cuda" in str(device) and not torch.cuda.is_available():
            device = None  # the harness's default, where nobody said anything
        self.model = load(source, str(dtype), str(device or "auto"))
        self.source, self.seed, self.max_gen_toks = source, int(seed), int(max_gen_toks)
        self.tokens = self.model.tokenizer
        self.max_length = self.model.decoder.config.max_positions
        self._device = self.model.decoder.embed.weight.device

    # ---- what the harness asks about the tokenizer ----

    @property
    def eot_token_id(self) -> int:
        stops = [self.tokens.eos_id, *sorted(self.tokens.stop_ids)]
        found = next((number for number in stops if number is not None), None)
        if found is None:
            raise UserError(f"{self.source}: the tokenizer has no end-of-text mark")
        return found

    @property
    def prefix_token_id(self) -> int:
        return self.tokens.bos_id if self.tokens.bos_id is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; by default with the marks (BOS) the tokenizer puts around one, unless it starts with them."""
        if add_special_tokens is None:
            raw = self.tokens.raw_encode(string)
            return raw if raw[:1] == [self.prefix_token_id] else self.tokens.encode(string)
        return self.tokens.encode(string) if add_special_tokens else self.tokens.raw_encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.tokens.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]  # to be continued, so without what ends its turn
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        name = chat_template if isinstance(chat_template, str) else "default"
        return self.tokens.templates.get(name) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return hashlib.sha256(str(self.model.folder.resolve()).encode()).hexdigest()[:16]

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results."""
        weight = self.model.decoder.embed.weight
        return {
            "model_num_parameters": sum(p.numel() for p in self.model.decoder.parameters()),
            "model_dtype": str(weight.dtype),
        }

    # ---- what it asks the model ----

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **ignored: Any
    ) -> list[tuple[float, bool]]:
        found, _work = likelihoods(
            self.model.decoder, [(context, continuation) for _, context, continuation in requests]
        )
        answers = [(each.logprob, each.greedy) for each in found]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        ends: list[int] = []
        for request in requests:
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in rolling]
            ends.append(len(windows))
        scored = [logprob for logprob, _ in self._loglikelihood_tokens(windows)]
        sums = [sum(scored[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        made: list[Request] = []
        stops: list[list[str]] = []
        eos = self.tokens.token_text(self.eot_token_id)
        for number, request in enumerate(requests):
            context, given = request.args
            until, sampling = self._sampling(given, eos)
            room = self.max_length - sampling.max_new_tokens
            if room < 1:
                raise UserError(
                    f"a task asks for {sampling.max_new_tokens} new tokens, but the model has {self.max_length} "
                    "positions; lower max_gen_toks"
                )
            made.append(Request(self.tok_encode(context)[-room:], sampling, first_sample=number))
            stops.append(until)
        longest = max(len(request.ids) + request.sampling.max_new_tokens for request in made)
        cache = EVALUATED_AT_ONCE * min(longest, self.max_length, PROMPT_TOKENS + self.max_gen_toks)
        engine = self.model.engine(EVALUATED_AT_ONCE, max(cache, longest))
        texts = [self.tokens.decode(sample.ids) for (sample,) in engine.generate(made)]
        answers = [_before(text, until) for text, until in zip(texts, stops, strict=True)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _sampling(self, given: Mapping[str, Any], eos: str) -> tuple[list[str], Sampling]:
        kwargs = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        known = {key: kwargs.pop(key) for key in ("top_k", "top_p", "min_p") if key in kwargs}
        longest, temperature = kwargs.pop("max_gen_toks"), float(kwargs.pop("temperature", 0.0))
        if unknown := sorted(kwargs.keys() - _IGNORED):
            raise UserError(f"a task wants {', '.join(unknown)}, which Farthing's engine does not have")
        stop = tuple(text for text in until if text and text != eos)
        if not kwargs.get("do_sample"):
            temperature = 0.0
        return until, Sampling(
            max_new_tokens=longest, temperature=temperature, stop=stop, seed=self.seed, **known
        )


def _before(text: str, until: Sequence[str]) -> str:
    for stop in until:
        text = text.split(stop)[0] if stop else text
    return text


def main() -> None:
    """The harness's own command, with `--model farthing` among its models."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as mistake:
        say(f"farthing: {mistake}", sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
