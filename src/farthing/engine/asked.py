"""The models of this process that rewards ask: judges and reward models (`tasks.rewards.models.Models`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from farthing.base.device import Place
from farthing.base.errors import UserError
from farthing.base.waiting import Waiting
from farthing.cost.meter import Span, book_sampling
from farthing.cost.room import room_for
from farthing.engine.model import Model
from farthing.engine.reward import RewardModel, spelled_apart
from farthing.engine.sampling import Sampling
from farthing.engine.sequence import Request
from farthing.tasks.item import Item
from farthing.tasks.rewards.models import Reply
from farthing.weights.sources import model_folder


class Asked:
    """Models by their source, each loaded when it is first asked, and kept; `say` hears of a load that takes long."""

    def __init__(self, place: Place, say: Callable[[str], None] = lambda _: None) -> None:
        self._place, self._say = place, say
        self._judges: dict[str, Model] = {}
        self._scorers: dict[str, RewardModel] = {}

    def replies(self, source: str, prompts: Sequence[str], max_new_tokens: int, span: Span) -> list[Reply]:
        """As `Models.replies`."""
        model = self._judge(source)
        asked = [_ids(model, prompt) for prompt in prompts]
        most = model.decoder.config.max_positions - max_new_tokens
        fit = [place for place, ids in enumerate(asked) if len(ids) <= most]
        found = [Reply(error=_too_long(len(ids), most)) for ids in asked]
        if fit:
            longest = max(len(asked[place]) for place in fit)
            engine = model.engine(len(fit), len(fit) * (longest + max_new_tokens + 16))  # whole pages
            sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
            replies = engine.generate([Request(asked[place], sampling) for place in fit])
            book_sampling(span, engine.done(), model.hf_config)
            for place, (reply,) in zip(fit, replies, strict=True):
                tokens = len(asked[place]) + len(reply.ids)
                found[place] = Reply(model.tokenizer.decode(reply.ids), tokens=tokens)
        return found

    def scores(self, source: str, pairs: Sequence[tuple[Item, str]], span: Span) -> list[float | str]:
        """As `Models.scores`."""
        model = self._scorer(source)
        most = model.decoder.config.max_positions
        found: list[float | str] = []
        texts: dict[int, list[int]] = {}
        for place, (item, answer) in enumerate(pairs):
            try:
                ids = model.ids(item.question, answer, item.system)
            except UserError as error:  # of the template, about this conversation
                found.append(str(error))
                continue
            found.append(_too_long(len(ids), most))
            if len(ids) <= most:
                texts[place] = ids
        for place, score in zip(texts, model.scores(list(texts.values()), span), strict=True):
            found[place] = score
        return found

    def _judge(self, source: str) -> Model:
        if source not in self._judges:
            with self._loading(f"loading the judge {source}", source) as folder:
                model = Model(folder, self._place.torch_dtype, self._place.device)
            if not model.tokenizer.has_template:
                raise UserError(
                    f"the judge {source} has no chat template to be asked by; take an instruct model"
                )
            self._judges[source] = model
        return self._judges[source]

    def _scorer(self, source: str) -> RewardModel:
        if source not in self._scorers:
            with self._loading(f"loading the reward model {source}", source) as folder:
                self._scorers[source] = RewardModel(folder, self._place.torch_dtype, self._place.device)
        return self._scorers[source]

    @contextmanager
    def _loading(self, doing: str, source: str) -> Iterator[Path]:
        with Waiting(doing, self._say):
            folder = model_folder(source)
            with room_for(doing, folder, self._place.device, self._place.dtype):
                yield folder


def _ids(model: Model, prompt: str) -> list[int]:
    return model.tokenizer.chat_ids([{"role": "user", "content": spelled_apart(prompt, model.tokenizer)}])


def _too_long(tokens: int, most: int) -> str:
    return f"the question with its answer has {tokens:,} tokens, and the model reads {most:,}"
