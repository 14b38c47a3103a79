"""Container files, as far as one can judge them without a container engine: users, health, versions, secrets."""

import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "infra" / "container" / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "infra" / "mlflow" / "compose.yaml").read_text(encoding="utf-8"))
FINAL = ("cpu", "cuda", "mlflow")


def stages() -> dict[str, list[str]]:
    """Name -> instructions of each stage, those of the stage it is built on first."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(None, text.splitlines()):
        if line.startswith("FROM "):
            base, name = re.fullmatch(r"FROM (\S+) AS (\S+)", line).groups()  # type: ignore[union-attr]
            found[name] = list(found.get(base, [line]))
        else:
            found[name].append(line)
    return found


def last(name: str, instruction: str) -> str:
    return [line for line in stages()[name] if line.startswith(f"{instruction} ")][-1]


@pytest.mark.parametrize("name", FINAL)
def test_image_runs_as_nobody_special_and_says_how_it_is(name: str) -> None:
    assert last(name, "USER") == "USER 1000:1000"
    instructions = [line.partition(" ")[0] for line in stages()[name]]
    assert "RUN" not in instructions[instructions.index("USER") :]
    program = yaml.safe_load(last(name, "HEALTHCHECK").partition("CMD ")[2])
    assert program[:2] == ["python", "-c"]
    compile(program[2], "health", "exec")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_ray_image_compiles_logs_in_and_says_its_commit(name: str) -> None:
    lines = stages()[name]
    (installed,) = [line for line in lines if "useradd" in line]
    # A compiler and Python's headers for our kernels and Triton's launcher; ssh and rsync for `ray up`.
    assert {"g++", "python3.11-dev", "openssh-client", "rsync", "wget"} <= set(installed.split())
    environment = dict(word.split("=", 1) for line in lines if line.startswith("ENV ") for word in line.split()[1:])
    assert environment["HOME"] == "/home/sparta"  # where `ray up` mounts what belongs into ~
    assert environment["SPARTA_GIT_COMMIT"] == "$SPARTA_GIT_COMMIT"
    assert "ARG SPARTA_GIT_COMMIT=unknown" in lines
    # A login shell, in which `ray up` runs its commands, begins with a PATH of its own.
    profile = re.search(r"echo '(.*)' >/etc/profile.d/sparta.sh", installed)
    assert profile is not None
    shell = ["sh", "-c", f"PATH=/usr/bin:/bin\n{profile[1]}\necho $PATH"]
    shown = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(environment["PATH"].partition(":")[0] + ":/usr/bin")


def test_base_images_and_services_have_versions() -> None:
    bases = re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.MULTILINE)
    outside = {base for base in bases if base not in stages()}
    images = outside | {service["image"] for service in COMPOSE["services"].values() if "build" not in service}
    assert all(re.search(r":v?\d+\.\d+", image) for image in images), images


def test_packages_are_those_of_the_constraints() -> None:
    pinned = {
        line.partition("==")[0].lower()
        for line in (ROOT / "infra/constraints.txt").read_text().splitlines()
        if "==" in line
    }
    installs = [line for line in stages()["mlflow"] if "pip install" in line]
    assert installs
    for line in installs:
        words = shlex.split(line[line.index("pip install") :])
        assert words[words.index("-c") + 1].endswith("constraints.txt")
        named = [word for word in words[2:] if not word.startswith("-") and not word.endswith(".txt")]
        assert {name.partition("[")[0].lower() for name in named} <= pinned
    for name in ("build-cpu", "build-cuda"):
        assert any("infra/setup.sh" in line for line in stages()[name] if line.startswith("RUN"))
    assert "-c infra/constraints.txt" in (ROOT / "infra" / "setup.sh").read_text()


def test_layers_keep_no_package_lists_and_context_no_secrets() -> None:
    for line in (line for lines in stages().values() for line in lines if "apt-get" in line):
        assert "--no-install-recommends" in line
        assert "rm -rf /var/lib/apt/lists/*" in line
    ignored = (ROOT / "infra" / "container" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert "infra/mlflow/secrets" in ignored


def test_compose_shows_the_server_to_this_host_alone() -> None:
    ports = {name: service.get("ports", []) for name, service in COMPOSE["services"].items()}
    assert ports == {"postgres": [], "store": [], "mlflow": ["127.0.0.1:5000:5000"]}
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert all("healthcheck" in COMPOSE["services"][name] for name in ("postgres", "store"))
    assert "--host=127.0.0.1" in COMPOSE["services"]["postgres"]["healthcheck"]["test"]  # its socket answers too early


def test_secrets_are_made_once_for_their_owner_and_are_all_that_compose_asks_for(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    command = [ROOT / "infra" / "mlflow" / "secrets.sh", directory]
    subprocess.run(command, check=True, capture_output=True)
    first = {path.name: path.read_text() for path in directory.iterdir()}
    subprocess.run(command, check=True, capture_output=True)
    assert {path.name: path.read_text() for path in directory.iterdir()} == first
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(len(first[name]) == 48 for name in first if name != "s3_config")
    assert len(set(first.values())) == len(first)
    identity = yaml.safe_load(first["s3_config"])["identities"][0]["credentials"][0]
    assert identity == {"accessKey": first["s3_access_key"], "secretKey": first["s3_secret_key"]}
    asked = {name for service in COMPOSE["services"].values() for name in service.get("secrets", [])}
    assert asked == set(COMPOSE["secrets"]) <= set(first)
    assert all(found["file"] == f"secrets/{name}" for name, found in COMPOSE["secrets"].items())
    tracked = subprocess.run(
        ["git", "check-ignore", "infra/mlflow/secrets/x"], cwd=ROOT, check=False, capture_output=True
    )
    assert tracked.returncode in (0, 128)  # 128: not a git checkout


def test_server_script_hands_passwords_over_by_environment_and_suits_other_stores(tmp_path: Path) -> None:
    subprocess.run([ROOT / "infra" / "mlflow" / "secrets.sh", tmp_path / "secrets"], check=True, capture_output=True)
    for name, does in (("mlflow", 'echo "$@"; env'), ("python", "exit 0")):  # python: makes the bucket
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SECRETS": str(tmp_path / "secrets"),
        "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://mlflow@db:5432/mlflow",
        "MLFLOW_ARTIFACTS_DESTINATION": "s3://mlflow",
        "MLFLOW_S3_ENDPOINT_URL": "https://store:8333",
    }
    script = ROOT / "infra" / "mlflow" / "start.sh"
    shown = subprocess.run([script], env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    passwords = [path.read_text() for path in (tmp_path / "secrets").iterdir()]
    assert not [password for password in passwords if password in shown[0]]
    assert f"PGPASSWORD={(tmp_path / 'secrets' / 'postgres_password').read_text()}" in shown
    # boto3's own default would put a checksum behind the body, which stores that do not know it keep as content.
    assert "AWS_REQUEST_CHECKSUM_CALCULATION=when_required" in shown
