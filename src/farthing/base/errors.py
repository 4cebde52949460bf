"""The exception for users' mistakes."""


class UserError(ValueError):
    """A mistake that the user can fix: one sentence that names what is wrong and what to do.

    The command line prints it as a single line and exits with code 2. Any other exception is a bug of ours and keeps
    its traceback.
    """
