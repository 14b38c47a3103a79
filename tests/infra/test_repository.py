"""The repository as a whole: what the README says is so, imports go one way, nothing is unpickled."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.conftest import script

ROOT = Path(__file__).parents[2]
MODULES = [
    path for package in ("pipeline", "sparta_models", "tune_spaces") for path in sorted((ROOT / package).rglob("*.py"))
]
HOMES = {
    "ray": ("pipeline/cluster/",),
    "mlflow": ("pipeline/tracking/",),
    "ffcv": ("pipeline/data/beton.py",),
}
ORDER = (
    "sparta_models tune_spaces",
    "config",
    "artifacts",
    "tracking",
    "data",
    "training",
    "evaluation",
    "report",
    "cluster",
    "stages",
    "chain plan registry",
    "run",
)
"""Each reads those of the lines above it alone, in-function imports and those for types included."""


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("library", HOMES)
def test_each_system_library_is_imported_in_one_place(library: str) -> None:
    elsewhere = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.partition(".")[0] == library for name in _imports(path))
        and not str(path.relative_to(ROOT)).startswith(HOMES[library])
    ]
    assert elsewhere == []


def test_sparta_models_needs_torch_alone() -> None:
    allowed = {"torch", "safetensors", "sparta_models", *sys.stdlib_module_names}
    foreign = {
        (path.name, name)
        for path in MODULES
        if "sparta_models" in path.parts
        for name in _imports(path)
        # Triton comes with torch's CUDA builds, and the one module that needs it is imported where it is there.
        if name.partition(".")[0] not in allowed | ({"triton"} if path.name == "gate_triton.py" else set())
    }
    assert foreign == set()


def test_imports_go_one_way() -> None:
    ranks = {part: rank for rank, parts in enumerate(ORDER) for part in parts.split()}
    backwards = {
        (str(path.relative_to(ROOT)), name)
        for path in MODULES
        for name in _imports(path)
        if (read := _part(name)) in ranks
        and read != (reader := _part(".".join(path.relative_to(ROOT).with_suffix("").parts)))
        and ranks[read] >= ranks[reader]
    }
    assert backwards == set()


def _part(module: str) -> str:
    """The part of the order that a module belongs to: "pipeline.data.beton" to data."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "pipeline" else package


def test_nothing_is_unpickled_but_what_a_process_gets_from_its_own_parent() -> None:
    pattern = re.compile(r"pickle\.loads?\(|allow_pickle=True|weights_only=False|joblib\.load|dill\.")
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (pattern.search(line) and "pickle.load(sys.stdin.buffer)" not in line)
        or ("torch.load(" in line and "weights_only=True" not in line)
    ]
    assert found == []


def test_readme_tree_is_current() -> None:
    tree = script("tree")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tree.updated(readme) == readme, "run: python infra/tree.py"


@pytest.mark.parametrize("script", ["infra/setup.sh", "infra/ui.sh", ".ci/run"])
def test_shell_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_no_machine_path_and_no_workplace_in_the_tree() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    pattern = re.compile(r"/work/main|/work/shared|/root/|/home/[a-z]+/")
    found = []
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".sh", ".toml", ".yaml", ".yml", ".txt", ""} and path.is_file():
            found += [name for line in path.read_text(encoding="utf-8").splitlines() if pattern.search(line)]
    assert set(found) <= {"tests/infra/test_repository.py"}
