"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one clear sentence with what, where and what to do.

    Commands print it without a traceback and exit with code 2.
    """
