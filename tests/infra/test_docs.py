"""The Python in README and docs runs as it stands there.

A document's blocks run in turn, in one namespace and an empty directory. A comment before a block changes it:

    <!-- test: setup          what the text takes for granted, run before the block
    CODE
    -->
    <!-- test: extended -->   the document's blocks run with make test-extended
    <!-- test: no, REASON --> only the block's imports run
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"(?:<!-- test: (?P<mark>.*?)-->\n)?```python\n(?P<code>.*?)```", re.DOTALL)


class Document(NamedTuple):
    path: Path
    code: str
    extended: bool


def _imports(code: str) -> str:
    """The import statements of a block; a block that is no Python raises."""
    return "\n".join(ast.unparse(n) for n in ast.parse(code).body if isinstance(n, ast.Import | ast.ImportFrom))


def read(path: Path) -> Document:
    """What runs of a document."""
    parts, extended = [], False
    for block in _BLOCK.finditer(path.read_text(encoding="utf-8")):
        mark, code = (block["mark"] or "").strip(), block["code"]
        kind, _, rest = mark.partition("\n")
        if kind == "setup":
            parts += [rest, code]
        elif kind.startswith("no, "):
            parts.append(_imports(code))
        elif kind in ("", "extended"):
            parts.append(code)
            extended = extended or kind == "extended"
        else:
            raise ValueError(f"{path.name}: expected a mark among setup, extended, no, got {mark!r}")
    return Document(path, "\n".join(parts), extended)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [d for path in PAGES if (d := read(path)).code]


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [pytest.param(d, id=d.path.stem, marks=[pytest.mark.extended] if d.extended else []) for d in DOCUMENTS],
)
def test_the_python_of_a_document_runs(document: Document, tmp_path: Path) -> None:
    script = tmp_path / "document.py"
    script.write_text(document.code, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    result = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        cwd=tmp_path / "empty",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr


def test_every_python_block_is_seen() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert len(_BLOCK.findall(text)) == len(re.findall(r"^[ >]*```[ \t]*py", text, re.MULTILINE)), path.name


def test_a_wrong_mark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text("<!-- test: never -->\n```python\nx = 1\n```\n")
    with pytest.raises(ValueError, match="expected a mark among setup, extended, no, got 'never'"):
        read(tmp_path / "page.md")
