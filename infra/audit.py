"""Audit of the installed packages, as far as that goes without a network: run by `make lint`.

Every package is the version that infra/constraints.txt pins, comes from an index and not from a URL or a folder, and
has what it requires. Known vulnerabilities are in a database that must be asked online:
`pip install pip-audit && pip-audit -r infra/constraints.txt` (SECURITY.md).
"""

import re
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CONSTRAINTS = Path(__file__).parent / "constraints.txt"
OWN = "sparta-activation"
# The platform's: which of them are installed depends on the build of torch; and the installers themselves.
UNPINNED = re.compile(r"^(nvidia-.*|cuda-.*|triton|pip|setuptools|wheel)$")
# torchattacks (tests only) asks for a requests of 2021; it runs with the current one.
TOLERATED = {("torchattacks", "requests")}


def pins(text: str) -> dict[str, str]:
    """Name -> version of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def problems(installed: dict[str, Distribution], pinned: dict[str, str]) -> Iterator[str]:
    """What is wrong with the installed packages, one line each."""
    for name, package in sorted(installed.items()):
        if name == OWN:
            continue
        if not UNPINNED.match(name) and pinned.get(name) != package.version:
            yield f"{name} {package.version} is installed, infra/constraints.txt says {pinned.get(name, 'nothing')}"
        if package.read_text("direct_url.json"):
            yield f"{name} was installed from a URL or a folder: {package.read_text('direct_url.json')}"
        for text in package.requires or ():
            yield from _unmet(name, Requirement(text), installed)


def _unmet(name: str, wanted: Requirement, installed: dict[str, Distribution]) -> Iterator[str]:
    needed = canonicalize_name(wanted.name)
    if (wanted.marker and not wanted.marker.evaluate({"extra": ""})) or (name, needed) in TOLERATED:
        return
    found = installed.get(needed)
    if found is None or not wanted.specifier.contains(found.version, prereleases=True):
        yield f"{name} requires {wanted}, installed is {found.version if found else 'none'}"


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    # Not sys.path: setuptools, once imported, puts the packages there that it carries for itself.
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=places)}
    found = list(problems(installed, pins(CONSTRAINTS.read_text(encoding="utf-8"))))
    for line in found:
        sys.stdout.write(f"audit: {line}\n")
    sys.stdout.write(f"audit: {len(installed)} packages, {len(found)} problems\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
