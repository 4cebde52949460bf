"""`farthing` and `python -m farthing`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line. While it is loaded there is nothing to unwind: Ctrl-C ends the process at once."""
    interrupted = signal.getsignal(signal.SIGINT)
    if interrupted is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from farthing.cli import main as run

    signal.signal(signal.SIGINT, interrupted)
    run()


if __name__ == "__main__":
    main()
