import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pipeline.config.base import ThreatModel
from pipeline.config.evaluation import EvaluationConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.evaluation.audit import CHECKS
from pipeline.evaluation.judged_model import model_digest
from pipeline.evaluation.records import AttackResult, AuditReport, Check, Evaluation
from pipeline.evaluation.stats import Accuracy
from pipeline.registry import main
from pipeline.tracking import Registry, Tracker
from pipeline.tracking.client import reaching
from pipeline.training import load_model, save_model
from pipeline.training.model_io import ModelMeta
from sparta_models import ActivationBank, build_model

THREAT = ThreatModel(eps=0.1)


def save_network(directory: Path, activation: str, width: int = 4) -> torch.nn.Module:
    torch.manual_seed(0)
    meta = ModelMeta(
        name="resnet8",
        options={"width": width},
        activation={"name": activation, "sharing": "site"},
        num_classes=5,
        in_channels=1,
        mean=(0.5,),
        std=(0.5,),
        image_size=8,
        dataset="digits",
    )
    model = meta.build()
    save_model(directory, model, meta)
    return model


@pytest.fixture
def network(root: Path) -> Path:
    """A model directory, and beside it the bank of its activations."""
    ActivationBank.from_model(save_network(root / "network", "sparta")).save(root / "bank")
    return root / "network"


def write_evaluation(
    directory: Path, network: Path, reference: Path, correct: int, *, budget: str = "full", attack: str = "autoattack"
):
    digest, union = model_digest(load_model(network)), Accuracy.of(correct, 100)
    checks = tuple(
        Check(number=number, name="a", verdict="pass", figure=0.0, warn_above=1, fail_above=2, summary="", details={})
        for number in range(1, len(CHECKS) + 1)
    )
    result = AttackResult(name=attack, threat=THREAT, attacked=90, fooled=90 - correct, accuracy=union)
    Evaluation(
        dataset="digits",
        data_digest="d" * 64,
        model_digest=digest,
        reference_digest=model_digest(load_model(reference)),
        seed=0,
        config=EvaluationConfig(threat=THREAT),
        n=100,
        split_size=100,
        clean=Accuracy.of(90, 100),
        attacks=(result,),
        union=union,
        other_threats=(),
        curve=(),
        per_class=(),
        warnings=(),
        arrays_sha256="a" * 64,
        audit=AuditReport(budget=budget, n=100, threat=THREAT, model_digest=digest, checks=checks),  # type: ignore[arg-type]
    ).save(directory)


def write_pair(root: Path, *, correct: int = 70, activation: str = "relu", width: int = 4, **changes):
    """Evaluations of the candidate, and of a control of this activation and width with 60 of 100 robust."""
    save_network(root / "control-network", activation, width)
    networks = (root / "network", root / "control-network")
    write_evaluation(root / "evaluation", *networks, correct, **changes)
    write_evaluation(root / "control", *reversed(networks), 60)


@pytest.fixture
def promote(root: Path, network: Path) -> Iterator[list[str]]:
    """Arguments of a promotion that the gate allows."""
    assert main(["--root", str(root), "push", str(root / "bank")]) == 0
    write_pair(root)
    names = ("network", "evaluation", "control", "control-network")
    arguments = [part for name in names for part in (f"--{name}", str(root / name))]
    return ["--root", str(root), "promote", "sparta-activation@candidate", *arguments]


def test_push_list_show_and_pull_go_round(
    root: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    at = ["--root", str(root)]
    assert main([*at, "push", str(root / "bank"), "--tag", "threat=linf 8/255", "--description", "mine"]) == 0
    assert main([*at, "list"]) == 0
    assert "sparta-activation/1" in capsys.readouterr().out
    assert main([*at, "show", "sparta-activation@candidate"]) == 0
    shown = capsys.readouterr().out
    assert "mine" in shown
    assert "linf 8/255" in shown
    assert main([*at, "pull", "sparta-activation/1", str(tmp_path / "pulled")]) == 0
    assert ActivationBank.load(tmp_path / "pulled").digest == ActivationBank.load(root / "bank").digest


def test_a_misspelt_root_is_not_begun_and_an_empty_registry_says_so(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["--root", str(tmp_path / "nosuch"), "list"]) == 2
    assert "expected the registry's database" in capsys.readouterr().err
    assert not (tmp_path / "nosuch").exists()
    assert main(["--uri", f"sqlite:///{tmp_path}/empty.db", "list"]) == 0
    assert capsys.readouterr().out == "no versions of sparta-activation so far\n"
    assert main(["--uri", f"sqlite:///{tmp_path}/empty.db", "pull", "sparta-activation@candidate", "x"]) == 2
    assert "known: nothing yet" in capsys.readouterr().err


def test_push_says_whose_the_alias_was_and_which_version_is_the_same(
    root: Path, network: Path, capsys: pytest.CaptureFixture[str]
):
    push = ["--root", str(root), "push", str(root / "bank")]
    assert main(push) == 0
    assert "was" not in capsys.readouterr().out
    assert main(push) == 0
    said = capsys.readouterr().out
    assert "@candidate was sparta-activation/1" in said
    assert "the same files as sparta-activation/1" in said


def test_lineage_leads_from_the_version_to_data_and_commit(
    root: Path, config: TrackingConfig, bank: Path, capsys: pytest.CaptureFixture[str]
):
    with Tracker(config, root).chain("demo", params={"seed": 0}) as chain:
        with chain.stage("prepare:source", tags={"fingerprint": "f0"}) as stage:
            stage.dataset("digits", "d" * 64, context="made")
        with chain.stage("pretrain:source", tags={"fingerprint": "f1"}, upstream={"prepare:source": "f0"}) as stage:
            stage.dataset("digits", "d" * 64)
        with chain.stage("freeze:bank", upstream={"pretrain:source": "f1", "prepare:source": "f0"}) as stage:
            stage.register(bank, tags={"variant": "depthwise"})
    assert main(["--root", str(root), "lineage", "sparta-activation@candidate"]) == 0
    told = capsys.readouterr().out
    for fact in ("sparta-activation/1 (candidate)", "variant: depthwise", "made by freeze:bank", "in chain demo"):
        assert fact in told
    assert "fingerprint: f1" in told
    assert "training data: digits sha256:" + "d" * 64 in told
    assert told.index("made by freeze:bank") < told.index("from pretrain:source") < told.index("from prepare:source")
    assert told.count("(above)") == 1
    assert "git.commit" in told


def test_runs_that_mlflow_no_longer_has_are_said_to_be_gone(
    root: Path, config: TrackingConfig, bank: Path, capsys: pytest.CaptureFixture[str]
):
    with Tracker(config, root).chain("demo") as chain:
        with chain.stage("prepare:source", tags={"fingerprint": "f0"}):
            pass
        with chain.stage("pretrain:source", tags={"fingerprint": "f1"}) as pretrain:
            pass
        with chain.stage("freeze:bank", upstream={"pretrain:source": "f1", "prepare:source": "f0"}) as freeze:
            freeze.register(bank)
    store = Registry(config, root).client._tracking_client.store

    def told_without(run_id: str | None) -> str:
        store._hard_delete_run(run_id)  # as `mlflow gc` does
        assert main(["--root", str(root), "lineage", "sparta-activation@candidate"]) == 0
        return capsys.readouterr().out

    told = told_without(pretrain.run_id)
    assert f"from pretrain:source, run {pretrain.run_id} (no longer in MLflow)" in told
    assert "from prepare:source" in told
    assert "in chain demo" in told
    assert f"in run {chain.run_id} (no longer in MLflow)" in told_without(chain.run_id)
    assert f"made by run {freeze.run_id} (no longer in MLflow)" in told_without(freeze.run_id)


def test_a_candidate_that_passes_becomes_champion(root: Path, promote: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(promote) == 0
    found = Registry(TrackingConfig(), root).resolve("sparta-activation@champion")
    assert found.version == 1
    assert "70.0 %" in found.tags["promotion"]
    assert "promoted_anyway" not in found.tags


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"budget": "quick"}, "expected an audit at full budget"),
        ({"attack": "pgd-ce-20x1"}, "expected AutoAttack"),
        ({"correct": 50}, "expected at least the control's robust accuracy"),
        ({"activation": "silu"}, "expected ReLU at every site of the control, got SiLU"),
        ({"width": 8}, "expected a control of the candidate's architecture"),
    ],
)
def test_a_candidate_without_the_evidence_is_refused(
    root: Path, promote: list[str], change: dict, reason: str, capsys: pytest.CaptureFixture[str]
):
    write_pair(root, **change)
    assert main(promote) == 1
    assert reason in capsys.readouterr().err
    with pytest.raises(ValueError, match="not in the registry"):
        Registry(TrackingConfig(), root).resolve("sparta-activation@champion")
    assert main([*promote, "--promote-anyway", "a deadline"]) == 0
    found = Registry(TrackingConfig(), root).resolve("sparta-activation@champion")
    assert found.tags["promoted_anyway"] == "a deadline"
    assert reason in found.tags["promotion_refused"]
    assert found.tags["promoted_by"]
    write_pair(root)  # the evidence comes later
    assert main(promote) == 0
    tags = Registry(TrackingConfig(), root).resolve("sparta-activation@champion").tags
    assert not {"promoted_anyway", "promotion_refused"} & tags.keys()
    assert "70.0 %" in tags["promotion"]


def test_a_candidate_is_not_its_own_control(root: Path, promote: list[str], capsys: pytest.CaptureFixture[str]):
    itself = [str(root / "evaluation"), "--control-network", str(root / "network")]
    assert main([*promote, "--control", *itself]) == 1
    refusal = capsys.readouterr().err
    assert "they are of the same weights" in refusal
    assert "expected ReLU at every site of the control, got Sparta" in refusal


def test_a_control_network_that_was_not_evaluated_is_no_evidence(
    root: Path, promote: list[str], capsys: pytest.CaptureFixture[str]
):
    save_network(root / "other", "relu", width=8)
    assert main([*promote, "--control-network", str(root / "other"), "--promote-anyway", "no"]) == 2
    assert "one of other weights" in capsys.readouterr().err


@pytest.mark.parametrize("alias", ["champion", "Champion"])
def test_push_gives_no_way_round_the_gate(root: Path, network: Path, alias: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--root", str(root), "push", str(root / "bank"), "--alias", alias]) == 1
    assert "expected another alias than champion" in capsys.readouterr().err
    assert Registry(TrackingConfig(), root).versions() == []


def test_a_user_whom_no_passwd_file_knows_may_promote(root: Path, promote: list[str], monkeypatch: pytest.MonkeyPatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 987654321)
    assert main(promote) == 0
    tags = Registry(TrackingConfig(), root).resolve("sparta-activation@champion").tags
    assert tags["promoted_by"] == "uid 987654321"


def test_an_evaluation_of_another_network_is_no_evidence(
    root: Path, promote: list[str], capsys: pytest.CaptureFixture[str]
):
    record = root / "evaluation" / "evaluation.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "model_digest": "0" * 64}))
    assert main([*promote, "--promote-anyway", "no"]) == 2
    assert "one of other weights" in capsys.readouterr().err


def test_a_network_with_another_activation_is_no_evidence(
    root: Path, network: Path, promote: list[str], capsys: pytest.CaptureFixture[str]
):
    other = build_model("resnet8", activation={"name": "sparta", "beta": 2.0}, num_classes=5, in_channels=1, width=4)
    ActivationBank.from_model(other).save(root / "other")
    assert main(["--root", str(root), "push", str(root / "other")]) == 0
    assert main(promote) == 2
    assert "expected a network trained with sparta-activation/2 in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nonsense"], "expected NAME@ALIAS or NAME/VERSION"),
        (["--root", "nosuch", "list"], "mlflow.db, got none; --root names the folder of the runs"),
        (["push", "nowhere"], "nowhere"),
        (["--uri", "ftp://x", "list"], "error: --uri: expected a tracking uri"),
        (["--uri", "http://me:hunter2@x", "list"], "expected a uri without a password"),
        (["--model", "a/b", "list"], r"error: --model: string should match pattern '^[^/:@\s]{1,200}$', got 'a/b'"),
        (["--model", "postgresql://me:hunter2@x/db", "list"], "--model: string should match pattern"),
        (["--model", f"postgresql://me:{40 * 'hunter2'}@x/db", "list"], "--model: string should match pattern"),
        (["--uri", "http://me:hunter2@x", "--model", "a/b", "list"], "--uri: expected a uri without a password"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    root: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["--root", str(root), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert "hunter2" not in error


def test_a_registry_that_is_away_is_one_line_and_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--uri", "http://127.0.0.1:9", "list"]) == 1
    error = capsys.readouterr().err
    assert "cannot be reached" in error
    assert error.count("\n") == 1


def test_a_tag_that_mlflow_refuses_is_refused_before_anything_is_logged(
    root: Path, network: Path, capsys: pytest.CaptureFixture[str]
):
    for text in ("who made it?=x", "=x", "alone"):
        assert main(["--root", str(root), "push", str(root / "bank"), "--tag", text]) == 2
        error = capsys.readouterr().err
        assert "expected --tag KEY=VALUE with a key of letters" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize("tag", ["promotion", "promoted_by", "evaluated_weights", "digest", "sparta.digest"])
def test_evidence_is_no_tag_that_a_user_gives(root: Path, network: Path, tag: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--root", str(root), "push", str(root / "bank"), "--tag", f"{tag}=x"]) == 2
    assert f"got '{tag}', which only this program writes" in capsys.readouterr().err


def test_what_a_folder_holds_is_nobodys_to_remove(root: Path, network: Path, capsys: pytest.CaptureFixture[str]):
    here = ["--root", str(root)]
    assert main([*here, "push", str(root / "bank")]) == 0
    (root / "empty").mkdir()
    assert main([*here, "pull", "sparta-activation@candidate", str(root / "empty")]) == 0
    assert ActivationBank.load(root / "empty") == ActivationBank.load(root / "bank")
    (root / "bank" / "card.md").write_text("mine")
    (root / "file").write_text("mine")
    capsys.readouterr()
    for arguments, message in (
        (["pull", "sparta-activation@candidate", str(root / "bank")], "got 'card.md' in"),
        (["push", str(root / "bank")], "a bank needs a folder of its own"),
        (
            ["pull", "sparta-activation@candidate", str(root / "file" / "below")],
            "expected a folder that can be written",
        ),
    ):
        assert main([*here, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "remove" not in error
        assert "cannot be reached" not in error


def test_a_full_disk_is_not_taken_for_a_server_that_is_away():
    with pytest.raises(OSError, match="No space left") as caught, reaching("http://127.0.0.1:9"):
        raise OSError(errno.ENOSPC, "No space left on device", "/big/bank")
    assert not isinstance(caught.value, ConnectionError)
    with pytest.raises(ConnectionError, match="cannot be reached"), reaching("http://127.0.0.1:9"):
        raise OSError(errno.EHOSTUNREACH, "No route to host")
