"""What the handler of a signal raises while Ray waits is not taken for a failure."""

import pytest

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
