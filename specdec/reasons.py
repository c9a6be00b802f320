"""What errors of others say, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]
