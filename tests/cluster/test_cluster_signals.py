"""What the handler of a signal raises while Ray starts or waits is not taken for a failure."""

import signal
import sys
from collections.abc import Iterator

import pytest

from pipeline.cluster.session import _own_sigterm
from pipeline.cluster.signals import raised_as_such


@pytest.mark.parametrize("raised", [KeyboardInterrupt, SystemExit])
def test_what_a_handler_raised_comes_out_as_itself(raised: type[BaseException]) -> None:
    with pytest.raises(raised) as caught, raised_as_such():
        raise SystemError("a result with an exception set") from raised()
    assert caught.value.__cause__ is None


def test_another_system_error_stays_one() -> None:
    with pytest.raises(SystemError, match="something else"), raised_as_such():
        raise SystemError("something else")
    with pytest.raises(SystemError, match="of a failure"), raised_as_such():
        raise SystemError("of a failure") from ValueError("bad")


class Stopped(BaseException):
    """What this application makes of SIGTERM."""


@pytest.fixture
def _own_handler() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    yield
    signal.signal(signal.SIGTERM, before)


def start_as_ray_does(code: int, *, terminated: bool) -> None:
    """Ray's first act is to take SIGTERM for itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    if terminated:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("_own_handler")
def test_sigterm_while_ray_starts_ends_as_at_any_other_time() -> None:
    with pytest.raises(Stopped), _own_sigterm():
        start_as_ray_does(15, terminated=True)
    with _own_sigterm():
        start_as_ray_does(15, terminated=False)
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit), _own_sigterm():
        start_as_ray_does(1, terminated=True)
