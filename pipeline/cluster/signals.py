"""Signals that arrive while Ray waits: what their handler raised comes out as itself."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def raised_as_such() -> Iterator[None]:
    """Around a wait of Ray's: its compiled code passes on what the handler of a signal raised as the cause of a
    SystemError, and whoever sees one takes the end that was asked for to be a failure."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, BaseException) and not isinstance(error.__cause__, Exception):
            raise error.__cause__ from None
        raise
