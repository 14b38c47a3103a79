"""Shell scripts without a finding of shellcheck; the runtime environment; a chain in a Slurm allocation of one node."""

import os
import subprocess
import sys
from pathlib import Path

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
    ignored = (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines()
    assert {".git", ".venv", "runs"} <= set(content["excludes"]) & set(ignored)


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
    command = [ROOT / "infra" / "slurm.sh", "scaling.num_workers=64"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "need 64 workers x CPU=1 (placement PACK), cluster has CPU=2 on 1 node" in ended.stderr
    assert not list((tmp_path / ".ray").glob("sparta-slurm-*"))
