"""Shell scripts without a finding of shellcheck; what a job takes along; a chain in a Slurm allocation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted([*(ROOT / "infra").rglob("*.sh"), ROOT / ".ci" / "run"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    ended = subprocess.run([program, script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    assert os.access(script, os.X_OK)


def test_runtime_environment_is_one_ray_accepts_and_holds_no_secret() -> None:
    from ray.runtime_env import RuntimeEnv

    content = yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text(encoding="utf-8"))
    RuntimeEnv(**content)  # refuses unknown fields and wrong types
    assert not [name for name in content["env_vars"] if any(word in name for word in ("PASSWORD", "SECRET", "TOKEN"))]


PATTERNS = {
    "runtime_env.yaml": yaml.safe_load((ROOT / "infra" / "runtime_env.yaml").read_text(encoding="utf-8"))["excludes"],
    ".rayignore": [
        line for line in (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ],
}


@pytest.mark.parametrize("name", PATTERNS)
def test_package_of_a_job_holds_all_of_the_code_and_nothing_that_changes(name: str) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    excluded = _get_excludes(ROOT, PATTERNS[name])
    packages = (ROOT / package for package in ("pipeline", "sparta_models", "tune_spaces"))
    code = [path for package in packages for path in package.rglob("*") if "__pycache__" not in path.parts]
    assert ROOT / "pipeline" / "data" / "__init__.py" in code
    assert [str(path.relative_to(ROOT)) for path in code if excluded(path)] == []
    # Directories are excluded as such: Ray does not look into them, hence not at what is being written there.
    changing = (".git", ".venv", "runs", "data", "mlruns", "logs", "results", "infra/mlflow/secrets", ".mypy_cache")
    assert [path for path in (*changing, "x.log", "pipeline/__pycache__") if not excluded(ROOT / path)] == []


def test_both_lists_of_what_stays_here_agree() -> None:
    assert PATTERNS[".rayignore"] == PATTERNS["runtime_env.yaml"]


class Checkout:
    """A checkout with `infra/setup.sh` on a machine that is made up: a user, and the packages that are installed."""

    # Who may install does; FFCV builds where OpenCV is.
    TOOLS: ClassVar = {
        "bin/id": 'cat "$MACHINE/user"',
        "bin/sudo": "exit 1",
        "bin/apt-get": '[ "$1" = update ] || { for p; do echo "$p"; done | grep -v "^-" >>"$MACHINE/packages"; }',
        "bin/dpkg-query": 'for p; do :; done; grep -qx -- "$p" "$MACHINE/packages" && echo "$p install ok installed"',
        "bin/pkg-config": "exit 1",
        ".venv/bin/python": """
            case "$*" in
              *"import ffcv"*) [ -f "$MACHINE/ffcv" ] ;;
              *ffcv==*) echo "build ffcv" >>"$MACHINE/calls"
                        grep -q opencv "$MACHINE/packages" && touch "$MACHINE/ffcv" ;;
              *"-m pip"*) echo "$*" >>"$MACHINE/calls" ;;
            esac""",
    }

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("infra/setup.sh", "infra/constraints.txt", "pyproject.toml"):
            (directory / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, directory / name)
        for name, text in self.TOOLS.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        self.set(user="1000", packages="")

    def set(self, **files: str) -> None:
        for name, text in files.items():
            (self.directory / name).write_text(text)

    def run(self) -> tuple[str, list[str]]:
        """What the last line says, and what was done with pip."""
        self.set(calls="")
        environment = {
            "PATH": os.pathsep.join([str(self.directory / "bin"), os.environ["PATH"]]),
            "MACHINE": str(self.directory),
            "PYTHON": str(self.directory / ".venv" / "bin" / "python"),
        }
        ended = subprocess.run(
            [self.directory / "infra" / "setup.sh", "dev"],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip().rpartition("\n")[2], (self.directory / "calls").read_text().splitlines()


@pytest.mark.parametrize("remedy", ["packages", "root"])
def test_what_setup_could_not_install_is_tried_again_when_that_can_be_better_and_only_then(
    remedy: str, tmp_path: Path
) -> None:
    checkout = Checkout(tmp_path)
    said, calls = checkout.run()
    assert "ready (dev), but for FFCV Chromium PostgreSQL: tried again once" in said
    assert any("--editable" in call for call in calls)
    assert checkout.run() == ("", [])
    if remedy == "packages":
        names = "g++ pkg-config libopencv-core-dev libopencv-imgproc-dev libturbojpeg0-dev libgl1 libglib2.0-0"
        checkout.set(packages=f"{names} chromium fonts-dejavu-core postgresql".replace(" ", "\n"))
    else:
        checkout.set(user="0")
    assert checkout.run() == ("[setup] ready (dev)", ["build ffcv"])
    assert checkout.run() == ("", [])


def test_setup_tries_what_is_missing_no_more_when_it_still_is(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.run()
    checkout.set(packages="postgresql\n")
    said, calls = checkout.run()
    assert "but for FFCV Chromium:" in said
    assert set(calls) == {"build ffcv"}
    assert checkout.run() == ("", [])
    (tmp_path / ".venv" / ".ready-dev").unlink()
    assert any("--editable" in call for call in checkout.run()[1])


class Slurm:
    """An allocation of two nodes that are this machine; stand-ins for Slurm's commands, Ray and the chain."""

    # srun runs what follows its options; a Ray node is a line in `calls` and a sleep; Debian names a machine 127.0.1.1.
    TOOLS: ClassVar = {
        "bin/scontrol": "printf 'node-a\\nnode-b\\n'",
        "bin/srun": 'while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
        "bin/hostname": 'if [ "$1" = --ip-address ]; then echo 127.0.1.1; else echo 10.0.0.7 10.1.0.7; fi',
        ".venv/bin/ray": 'echo "ray on $SRUN_CPUS_PER_TASK cores: $*" >>"$CALLS"; exec sleep 60',
    }

    def __init__(self, directory: Path, chain: str) -> None:
        self.calls, self.home = directory / "calls", directory / "home"
        self.calls.touch()
        python = f'if [ "$1" = -c ]; then grep -c "^ray on" "$CALLS"; exit 0; fi; echo "chain $*" >>"$CALLS"; {chain}'
        for name, text in {**self.TOOLS, ".venv/bin/python": python}.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"#!/bin/sh\n{text}\n")
            path.chmod(0o755)
        self.environment = {
            "PATH": os.pathsep.join([str(directory / "bin"), os.environ["PATH"]]),
            "HOME": str(self.home),
            "CALLS": str(self.calls),
            "SLURM_SUBMIT_DIR": str(directory),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node-[a-b]",
            "SLURM_CPUS_PER_TASK": "4",
        }

    def run(self, *arguments: str) -> int:
        command = [ROOT / "infra" / "slurm.sh", *arguments]
        return subprocess.run(command, env=self.environment, timeout=60, check=False).returncode


def test_slurm_script_gives_every_node_its_cores_and_an_address_that_others_reach(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, chain="exit 7")
    assert slurm.run("demo", "name=x") == 7
    *nodes, chain = slurm.calls.read_text().splitlines()
    assert chain == "chain -m pipeline.run demo name=x"
    assert len(nodes) == 2
    assert all(line.startswith("ray on 4 cores: start ") and "--num-cpus 4 " in line for line in nodes)
    (head,) = [line for line in nodes if "--head" in line]
    (worker,) = [line for line in nodes if "--head" not in line]
    assert "--node-ip-address=10.0.0.7 " in head
    assert "--address=10.0.0.7:24711 " in worker
    assert list((slurm.home / ".ray").iterdir()) == []  # the token went with the allocation


def test_slurm_script_hands_a_signal_on_to_the_chain_and_waits_for_it(tmp_path: Path) -> None:
    begins = "trap 'echo checkpoint >>\"$CALLS\"; exit 143' TERM; sleep 0.5"
    ending = f"{begins}; kill -TERM $PPID; while sleep 0.1; do :; done"
    slurm = Slurm(tmp_path, chain=ending)
    assert slurm.run("demo") == 143
    assert slurm.calls.read_text().splitlines()[-1] == "checkpoint"


@pytest.mark.ray
@pytest.mark.slow
def test_slurm_script_starts_ray_passes_the_exit_code_on_and_cleans_up(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    # Slurm's own two commands, for an allocation that is this machine: srun runs what follows its options.
    (tools / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tools / "srun").write_text('#!/bin/sh\nwhile [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"\n')
    (tools / "hostname").write_text("#!/bin/sh\necho 127.0.0.1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(tools), os.environ["PATH"]]),
        "HOME": str(tmp_path),
        "SPARTA_RUNS": str(tmp_path / "runs"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "2",
    }
    command = [ROOT / "infra" / "slurm.sh", "scaling.num_workers=32"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "need 32 workers x CPU=1 (placement PACK), cluster has CPU=2 on 1 node" in ended.stderr
    assert not list((tmp_path / ".ray").glob("sparta-slurm-*"))
