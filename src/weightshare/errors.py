"""The one exception a person is meant to read."""


class UserError(Exception):
    """Input that cannot be used, raised where it enters.

    The message is one sentence: what was given, what is allowed, what to do. The command line
    prints it without a traceback and exits with status 2; any other exception is a bug.
    """


def first_line(error: BaseException) -> str:
    """What another library's error says, short enough to stand inside a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
