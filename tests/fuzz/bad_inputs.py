"""What the fuzz tests share: damaged values and bytes, and the proof that each is refused by one clean line."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.sampled_from([-1, 0, 2**31, 2**63, 1e308, float("inf"), float("nan"), "", "\x00", "../../etc/passwd", "8/0"]),
    st.floats(),
    st.text(max_size=12),
    st.lists(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything inside a JSON value, the value itself apart."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for key, item in inner for p in ((*path, key), *places(item, (*path, key)))]


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three things in it replaced, removed, renamed or added."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        inside = places(result)
        if not inside:
            return draw(JUNK)
        *above, last = draw(st.sampled_from(inside))
        holder = result
        for key in above:
            holder = holder[key]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                holder[last] = draw(JUNK)
            case "remove":
                del holder[last]
            case "add":
                _add(holder, draw(st.text(max_size=5)), draw(JUNK))
    return result


def _add(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, list):
        holder.append(value)
    else:
        holder[name] = value


@st.composite
def spoilt(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that were cut off, overwritten, doubled or replaced."""
    position = draw(st.integers(0, len(content)))
    other = draw(st.binary(max_size=16))
    match draw(st.sampled_from(["cut", "overwrite", "insert", "replace"])):
        case "cut":
            return content[:position]
        case "overwrite":
            return content[:position] + other + content[position + len(other) :]
        case "insert":
            return content[:position] + other + content[position:]
        case _:
            return other


def all_refused(
    inputs: st.SearchStrategy[Any],
    use: Callable[[Any], object],
    error: type[Exception],
    *,
    count: int,
    unchanged: Path | None = None,
    lines: int = 1,
) -> None:
    """Assert that `count` inputs are refused by `error` with so many lines at most, and that `unchanged` stays as it
    was.

    An input that happens to be valid does not count.
    """
    refused = 0

    @settings(
        max_examples=count,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        derandomize=True,
        suppress_health_check=HealthCheck,
    )
    @given(inputs)
    def run(value: Any) -> None:
        nonlocal refused
        before = _tree(unchanged)
        try:
            use(value)
        except error as refusal:
            said = str(refusal)
        else:
            said = None
        assert _tree(unchanged) == before, "something was written"
        assume(said is not None)
        assert said
        assert said.count("\n") < lines, said
        assert all(line.strip() for line in said.split("\n")), said
        refused += 1

    run()
    assert refused >= count, f"only {refused} of {count} inputs were bad"


def _tree(directory: Path | None) -> set[str]:
    return set() if directory is None else {str(path) for path in directory.rglob("*")}
