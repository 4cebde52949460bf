"""The exception shown to users."""


class UserError(ValueError):
    """An error the user can fix: one sentence that says what is wrong and what to do.

    The command line prints it on one line and exits with code 2. Any other exception is a bug in Farthing and keeps its
    traceback.
    """
