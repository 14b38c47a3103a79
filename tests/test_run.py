"""The command line: exit codes, one readable line per mistake, nothing written by a refusal or a dry run."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock, Timeout
from PIL import Image

from pipeline import run
from pipeline.chain import Action, Decision
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError, load_config
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one

pytestmark = pytest.mark.usefixtures("own_root")


@pytest.fixture(autouse=True)
def _own_signals() -> object:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trainng.epochs=3"], "did you mean 'training'?"),
        (["training.threat.eps=2"], "expected 0 < eps <= 1 for linf, got 2.0"),
        (["no-such-preset"], "expected a preset"),
        (["--from", "report", "--until", "prepare"], "expected --from not after --until"),
        (["data.dataset=npz", "data.path=missing.npz", "data.classes=null"], "missing.npz"),
        (["data.dataset=folder", "data.path=missing", "data.classes=null"], "missing"),
        (["data.dataset=npz"], "needs data.path"),
        (["search.enabled=true", "search.space=atack"], "expected a search space"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("sparta: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("other", ["--from", "--until"])
def test_one_stage_and_a_range_of_stages_are_refused_together(other: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        run.main(["--only", "prepare", other, "report"])
    assert refused.value.code == 2
    assert "expected --only without --from and --until" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "training.optimizer.lr: {uniform: [1",
        "training.optimizer.lr: 3",
        "training.optimizer.lrr: {uniform: [0.1, 0.2]}",
    ],
)
def test_a_bad_space_file_is_one_line_and_exit_2(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(text)
    assert run.main(["search.enabled=true", f"search.space={space}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparta: search")
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_the_cluster_has_is_exit_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    assert run.main(["scaling.num_workers=4096", "training.batch_size=8192"]) == 3
    assert time.monotonic() - begin < 5  # what takes time is starting a Ray, which may not happen
    error = capsys.readouterr().err
    assert "need 4096 workers" in error
    assert "scaling.num_workers" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_trial_that_is_too_big_is_exit_3_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["search.enabled=true", "search.num_workers=4096", "training.batch_size=8192"]) == 3
    assert "lower search.num_workers" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_workers_of_a_trial_are_asked_for_only_while_the_search_is_ahead() -> None:
    nodes = run.head(load_config("demo", ["search.enabled=true"]), planning=True)
    done, *_ = [Decision(node, Action.SKIP, "") for node in nodes if node.stage == "search"]
    ahead = replace(done, action=Action.RUN)
    assert run._trainings_ahead([done]) == set()
    assert run._trainings_ahead([ahead, *(Decision(node, Action.RUN, "") for node in nodes)]) == {"search"}


def test_dry_run_names_every_stage_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    for stage in (
        "prepare:source",
        "pretrain:source",
        "freeze:bank",
        "transfer:deeper",
        "evaluate:deeper",
        "report:page",
    ):
        assert stage in printed
    assert "search" not in printed
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_output_that_nobody_reads_ends_the_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pipeline.run", "--dry-run"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_dry_run_shows_an_enabled_search(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--dry-run", "search.enabled=true"]) == 0
    assert "search:best" in capsys.readouterr().out


def test_later_stage_alone_fails_when_the_earlier_ones_are_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "report"]) == 1
    assert "not chosen to run" in capsys.readouterr().out


def test_a_dry_run_says_what_the_run_would_not_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--only", "report", "--dry-run"]) == 1
    printed = capsys.readouterr().out
    assert "not chosen to run" in printed
    assert "TFLOP" not in printed


@pytest.mark.parametrize("option", ["--only", "--force"])
def test_a_stage_that_the_chain_has_not_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([option, "search", "--dry-run"]) == 2
    assert "got search; search.enabled=true adds it" in capsys.readouterr().err


def test_a_dry_run_tells_of_two_threats(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["demo", "evaluation.threat.eps=0.3", "--dry-run"]) == 0
    assert "trained against linf 0.15, judged under linf 0.3" in capsys.readouterr().out
    assert run.main(["demo", "--dry-run"]) == 0
    assert "judged under" not in capsys.readouterr().out


@pytest.mark.slow
def test_prepare_says_what_there_is_and_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (20, 24), (number, 0, 0)).save(tmp_path / "pets" / name / f"{number}.png")
    settings = [f"data.path={tmp_path}/pets", "data.dataset=folder", "data.image_size=16", "data.classes=null"]
    command = [*settings, "data.on_bad_image=skip", "transfer=[]", "tracking.enabled=false", "--until", "prepare"]
    assert run.main(command) == 0
    assert re.search(r"s: \d+ train, \d+ val, 10 test images of 2 classes\n", capsys.readouterr().out)
    (tmp_path / "pets" / "a" / "bad.jpg").write_text("no image")
    assert run.main(command) == 0
    assert re.search(r"of 2 classes; 1 files left out \(.*bad_images\.txt\)\n", capsys.readouterr().out)


def toy_node(stage: str, branch: str, *needs: str) -> Node[str]:
    """Writes its branch's name, unless that is "broken"."""

    def write(context: StageContext[str]) -> StageResult:
        if context.task == "broken":
            raise ValueError("expected 8 channels, got 12")
        (context.directory / "out.txt").write_text(context.task)
        return StageResult({}, ["out.txt"])

    return Node(stage, branch, branch, {}, one_by_one(write), needs)


@pytest.fixture
def toy_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of two transfers, one of them broken, each with an evaluation; without Ray."""
    monkeypatch.setattr(run, "head", lambda config, planning=False: [toy_node("prepare", "source")])
    branches = ("good", "broken")
    transfers = [toy_node("transfer", branch, "prepare:source") for branch in branches]
    evaluations = [toy_node("evaluate", branch, f"transfer:{branch}") for branch in branches]
    monkeypatch.setattr(run, "tail", lambda config: [*transfers, *evaluations])


@pytest.mark.usefixtures("toy_chain")
def test_a_broken_branch_is_named_at_the_end_with_what_it_blocks_and_exit_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["tracking.enabled=false"]) == 1
    printed = capsys.readouterr().out
    assert (
        "2 not done:\n  transfer:broken: ValueError: expected 8 channels, got 12\n  evaluate:broken: needs" in printed
    )
    assert re.findall(r"^(\S+) +done ", printed, re.MULTILINE) == ["prepare:source", "transfer:good", "evaluate:good"]
    details = tmp_path / "runs" / "demo" / "failures" / "transfer-broken.txt"
    assert f"(traceback: {details})" in printed
    assert "Traceback" in details.read_text()


@pytest.mark.usefixtures("toy_chain")
def test_another_chain_is_kept_out_while_the_search_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, lock = [], tmp_path / "runs" / "demo" / ".lock"

    def tuned(config: ChainConfig, done: object) -> ChainConfig:
        if lock.exists():  # not yet when the chain is planned
            with pytest.raises(Timeout):
                FileLock(lock).acquire(timeout=0)
            refused.append(done)
        return config

    monkeypatch.setattr(run, "tuned", tuned)
    assert run.main(["tracking.enabled=false"]) == 1
    assert len(refused) == 1


def test_the_page_in_the_chains_folder_is_that_of_the_configuration_that_ran_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def page(context: StageContext[str]) -> StageResult:
        if context.task == "broken":
            raise ValueError("no page")
        (context.directory / run.REPORT).write_text(context.task)
        return StageResult({"page": run.REPORT}, [run.REPORT])

    def ran(title: str, *options: str) -> str | None:
        tail = [Node("report", "page", title, {"title": title}, one_by_one(page), ())]
        monkeypatch.setattr(run, "tail", lambda config: tail)
        monkeypatch.setattr(run, "closing_lines", lambda *_: "")
        run.main(["tracking.enabled=false", *options])
        shown = tmp_path / "runs" / "demo" / run.REPORT
        return shown.read_text() if shown.exists() else None

    monkeypatch.setattr(run, "head", lambda config, planning=False: [toy_node("prepare", "source")])
    assert [ran("a"), ran("b"), ran("a")] == ["a", "b", "a"]  # the third has nothing to do
    assert ran("broken") is None
    assert ran("a") == "a"
    assert ran("a", "--until", "prepare") == "a"  # it is its own page still
    assert ran("a", "--only", "transfer") == "a"
    assert ran("b", "--until", "evaluate") == "b"  # which was made before
    assert ran("c", "--until", "evaluate") is None


def test_images_are_counted_before_the_search_and_for_the_stages_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [toy_node("prepare", "source"), toy_node("search", "best", "prepare:source")]
    monkeypatch.setattr(run, "head", lambda config, planning=False: nodes)
    monkeypatch.setattr(run, "tail", lambda config: [toy_node("evaluate", "source", "prepare:source")])

    def refuse(planned: list[Node[str]], done: object) -> None:
        if planned:
            raise ConfigError("more images than there are")

    monkeypatch.setattr(run, "check_images", refuse)
    monkeypatch.setattr(run, "tuned", lambda config, done: config)
    assert run.main(["tracking.enabled=false"]) == 2
    printed = capsys.readouterr()
    assert "more images than there are" in printed.err
    assert "prepare:source" in printed.out
    assert "search:best" not in printed.out
    assert run.main(["tracking.enabled=false", "--until", "search"]) == 0
    assert "search:best" in capsys.readouterr().out


@pytest.mark.slow
def test_nothing_is_trained_without_the_activation_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert run.main(["bank.registered=sparta-activation/9", "--until", "transfer"]) == 2
    printed = capsys.readouterr().out
    assert "is not in the registry; known: nothing yet" in printed
    assert "\n1 not done:\n  freeze:bank: " in printed
    assert not re.search("^transfer", printed, re.MULTILINE)
    assert not (tmp_path / "runs" / "demo" / "transfer").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning")
def test_a_cluster_that_refuses_the_token_is_one_line_and_exit_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray
    from ray.exceptions import AuthenticationError

    def refuse(**options: object) -> None:
        raise AuthenticationError("Invalid authentication token.\nEnsure that it is the cluster's")

    monkeypatch.setattr(ray, "init", refuse)
    assert run.main(["scaling.address=127.0.0.1:1"]) == 3
    error = capsys.readouterr().err
    assert "expected a Ray cluster at '127.0.0.1:1', got Invalid authentication token." in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_command_line_ends_with_the_exit_code_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipeline.run", "training.epochs=-1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert "training.epochs" in ended.stderr


def test_a_signal_that_comes_out_of_ray_as_another_error_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def by_signal(*_: object) -> None:
        raise SystemError("a result with an exception set") from run.Terminated()

    monkeypatch.setattr(run, "_run", by_signal)
    assert run.main([]) == run.TERMINATED
    assert capsys.readouterr().err == "sparta: terminated; the same command goes on from here\n"

    def by_itself(*_: object) -> None:
        raise SystemError("something else")

    monkeypatch.setattr(run, "_run", by_itself)
    with pytest.raises(SystemError, match="something else"):
        run.main([])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_chain_says_so_and_goes_on_later(tmp_path: Path, number: signal.Signals, code: int) -> None:
    environment = {**os.environ, "SPARTA_RUNS": str(tmp_path / "runs")}
    command = [sys.executable, "-m", "pipeline.run", "tracking.enabled=false", "--until", "prepare"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while child.poll() is None and not list((tmp_path / "runs").glob("demo/prepare/source/*/started.json")):
        time.sleep(0.01)
    child.send_signal(number)
    _, error = child.communicate(timeout=60)
    assert child.returncode == code
    assert "Traceback" not in error
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "prepare:source" in ended.stdout
