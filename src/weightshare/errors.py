"""The one exception a person is meant to read."""


class UserError(Exception):
    """Input that cannot be used, raised where it enters.

    The message is one sentence: what was given, what is allowed, what to do. The command line
    prints it without a traceback and exits with status 2; any other exception is a bug.
    """
