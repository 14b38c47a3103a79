"""The audit of packages finds what it is there to find."""

import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.infra.conftest import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return script("audit")


def package(version: str, *requires: str, url: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(version=version, requires=requires, read_text=lambda name: url)


def test_each_kind_of_problem_is_named_and_a_sound_set_has_none(audit: ModuleType) -> None:
    pinned = audit.pins("# comment\nA_b==1.0\nc==2.0  # why\nd==1\n")
    assert pinned == {"a-b": "1.0", "c": "2.0", "d": "1"}
    sound = {"a-b": package("1.0", "c>=2", "e; extra == 'x'"), "c": package("2.0"), "nvidia-x": package("9")}
    assert list(audit.problems(sound, pinned)) == []
    odd = {"a-b": package("1.1", "c>=3", "z"), "c": package("2.0", url="{}"), "f": package("1")}
    found = list(audit.problems(odd, pinned))
    assert len(found) == 5
    assert "a-b 1.1 is installed, infra/constraints.txt says 1.0" in found
    assert "a-b requires c>=3, installed is 2.0" in found
    assert "a-b requires z, installed is none" in found
    assert any("from a URL" in line for line in found)
    assert "f 1 is installed, infra/constraints.txt says nothing" in found


def test_every_dependency_is_pinned_within_its_range(audit: ModuleType) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = audit.pins((ROOT / "infra" / "constraints.txt").read_text())
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    loose = [
        text
        for text in wanted
        if not Requirement(text).specifier.contains(pinned.get(canonicalize_name(Requirement(text).name), "0"))
    ]
    assert loose == []


def test_the_installed_packages_pass(audit: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert sys.prefix != sys.base_prefix, "expected to run in .venv"
    code = audit.main()
    assert code == 0, capsys.readouterr().out
