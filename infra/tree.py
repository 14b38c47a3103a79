"""Write the tree of the README from the first sentence of every module; a test compares, so it cannot go stale."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("sparta_models", "pipeline", "tune_spaces")
BEGIN, END = "<!-- tree -->", "<!-- /tree -->"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[a-z0-9)])[.:](?: [A-Z]|$)", paragraph)[0].rstrip(".:")


def tree() -> str:
    """The tree of the packages, one line per file; a folder's line is that of its __init__.py."""
    lines = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py"), key=_folders_first):
            parts = path.relative_to(ROOT).parts
            is_folder = path.name == "__init__.py"
            depth = len(parts) - (2 if is_folder else 1)
            name = f"{parts[-2]}/" if is_folder else parts[-1]
            lines.append(f"{'  ' * depth}{name}".ljust(34) + first_sentence(path))
    return "\n".join(lines)


def _folders_first(path: Path) -> tuple[str, ...]:
    # "~" sorts after letters: the files of a folder come before its subfolders, __init__.py before all.
    *folders, name = path.relative_to(ROOT).parts
    return (*(f"~{folder}" for folder in folders), "" if name == "__init__.py" else name)


def updated(readme: str) -> str:
    """The README with a fresh tree between its two marks."""
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n```text\n{tree()}\n```\n{END}{tail}"


if __name__ == "__main__":
    target = ROOT / "README.md"
    target.write_text(updated(target.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write("README.md: tree written\n")
