"""The one exception a user is meant to see."""


class UserError(ValueError):
    """A mistake the user can mend: one sentence that names what is wrong and what to do.

    The command line prints it as a single line and exits with code 2. Anything else that escapes is a bug of ours
    and keeps its traceback.
    """
