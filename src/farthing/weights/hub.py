"""The files of a Hugging Face repository: which are fetched, how far that is, and why it failed.

The library hides a reason behind several exceptions, and says ten lines of retries before the one error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from farthing.base.errors import UserError
from farthing.base.limits import is_disk_full, unwritable
from farthing.base.terminal import one_line
from farthing.base.waiting import Transfer
from farthing.weights.chat_template import FOLDER
from farthing.weights.folder import PICKLED

_FILES = [
    "*.safetensors", "*.json", "tokenizer*", "tiktoken.model", "*.txt", "*.jinja", "README.md", "LICENSE*",
]  # fmt: skip
# Subfolders and "consolidated" hold the same weights in other layouts; the pickles are never wanted.
_IGNORED = ["*/*", "consolidated*", "*.py", *PICKLED]
_PAGE = "https://huggingface.co"
_LONGEST = 160  # characters of a reason in the library's own words


def fetch(repository: str, revision: str | None, offline: bool) -> Path:
    """The local folder of a repository; raises the library's errors.

    Args:
        offline: take only what is in the library's cache.
    """
    from huggingface_hub import snapshot_download

    options: dict[str, Any] = {"revision": revision, "local_files_only": offline}
    if offline:
        return Path(snapshot_download(repository, allow_patterns=_FILES, ignore_patterns=_IGNORED, **options))
    meter = _Meter()
    with Transfer(f"downloading {repository}", meter.now), _without_retries():
        options["tqdm_class"] = meter.bar()
        folder = Path(
            snapshot_download(repository, allow_patterns=_FILES, ignore_patterns=_IGNORED, **options)
        )
        # patterns cannot tell this subfolder from the others
        snapshot_download(repository, allow_patterns=[f"{FOLDER}/*.jinja"], **options)
    return folder


def download(text: str, repository: str, revision: str | None) -> Path:
    """Fetch what `text` names. Raises UserError with the reason it could not be."""
    try:
        return fetch(repository, revision, offline=False)
    except Exception as error:  # the library's errors share no base, and change with its HTTP client
        if is_disk_full(error):
            raise UserError(f"no room on the disk for {text}; free some space or set HF_HOME") from None
        if reason := unwritable(error):
            raise UserError(
                f"{text} cannot be kept ({reason}); set HF_HOME to a folder with room for the model"
            ) from None
        raise UserError(f"{text} {_why(error, repository)}") from None


class _Meter:
    """Bytes that the library's progress bars count, none of which is shown."""

    def __init__(self) -> None:
        self._bars: list[Any] = []

    def now(self) -> tuple[int, int]:
        """Bytes that are there, and all of them."""
        counts = [(int(bar.n), int(bar.total or 0)) for bar in list(self._bars)]
        return max(counts, default=(0, 0), key=lambda pair: pair[1])  # received, or written: the same bytes

    def bar(self) -> type[Any]:
        from huggingface_hub.utils import tqdm

        bars = self._bars

        class Silent(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                is_bytes = options.get("unit") == "B"
                super().__init__(*args, **options | {"disable": True})
                self.total = options.get("total") or 0  # a bar that is not shown counts nothing by itself
                self.n = options.get("initial") or 0
                if is_bytes:
                    bars.append(self)

            def update(self, n: float | None = 1) -> None:
                self.n += n or 0

        return Silent


@contextmanager
def _without_retries() -> Iterator[None]:
    """Keep the library from warning of each try; its error says as much."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _why(error: BaseException, repository: str) -> str:
    """What a failed download comes to, and what to do about it."""
    from huggingface_hub import errors as known
    from huggingface_hub import get_token

    chain = list(_chain(error))

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    token = get_token() is not None
    elsewhere = f"or download it elsewhere (`hf download {repository}`) and give its path"
    if met(known.GatedRepoError):
        who = "with the account of your HF_TOKEN" if token else "and set HF_TOKEN"
        return f"asks for consent first; accept its licence at {_PAGE}/{repository} {who}"
    if met(known.RevisionNotFoundError):
        return "has no such revision; leave @REVISION out for the newest"
    if met(known.DisabledRepoError):
        return f"is disabled on the Hugging Face hub; see {_PAGE}/{repository}"
    status = next((found for one in chain if (found := _status(one)) is not None), None)
    if status == 401 and token:
        where = f"{_PAGE}/settings/tokens"
        return f"was not given: the Hugging Face hub does not accept your HF_TOKEN; renew it at {where}, or unset it"
    if met(known.RepositoryNotFoundError) or status in (401, 404):
        private = (
            "or whether your HF_TOKEN may read it" if token else "or set HF_TOKEN if the model is private"
        )
        return f"is no path here, and no such public model is on the Hugging Face hub; check the spelling, {private}"
    if met(known.OfflineModeIsEnabled):
        return f"is not here, and HF_HUB_OFFLINE keeps from downloading it; unset it, {elsewhere}"
    if status == 429:
        return "was not given: the Hugging Face hub had too many requests from here; wait some minutes, or set HF_TOKEN"
    if status is not None:
        return f"was not given: the Hugging Face hub answers {status}; try again later, {elsewhere}"
    return f"is not here and the Hugging Face hub cannot be reached ({_words(chain)}); connect, {elsewhere}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, which the library's last one hides."""
    for _ in range(20):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _words(chain: list[BaseException]) -> str:
    """The first cause in its own words: "Name or service not known"."""
    for one in reversed(chain):
        number = one.args[0] if len(one.args) > 1 and isinstance(one.args[0], int) else None
        words = one_line(str(one.args[1] if number is not None else one))
        if words:
            return words[:_LONGEST]
    return type(chain[0]).__name__
