"""The chain's decisions, on nodes that write a file each."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from pipeline.artifacts import temporary_name
from pipeline.chain import Action, Chain, OutputLockedError
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one


class RecordingRun:
    """Takes what a stage tells MLflow."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.failed = False

    def tag(self, tags: dict[str, str]) -> None:
        self.tags |= tags

    def fail(self) -> None:
        self.failed = True


class LocalServices:
    """Neither Ray nor MLflow."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.runs: dict[str, RecordingRun] = {}

    @contextmanager
    def stage_run(self, key: str, *described: Any) -> Iterator[RecordingRun]:
        self.runs[key] = RecordingRun()
        yield self.runs[key]

    def log_failure(self, key: str, error: Exception) -> str:
        return "failure.txt"


class House:
    """A chain of three nodes, a -> b -> c, and d beside them, with a count of how often each ran."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.ran: list[str] = []
        self.broken: set[str] = set()
        self.settings = {"a": 1, "b": 1, "c": 1, "d": 1}
        self.runner = one_by_one(self._stage)
        self.lines: list[str] = []

    def _stage(self, context: StageContext[str]) -> StageResult:
        if context.task in self.broken:
            raise ValueError(f"{context.task} is broken")
        self.ran.append(context.task)
        upstream = "".join((done.directory / "out.txt").read_text() for done in context.upstream.values())
        (context.directory / "out.txt").write_text(f"{context.task}{self.settings[context.task]}({upstream})")
        return StageResult({}, ["out.txt"])

    def nodes(self) -> list[Node[str]]:
        needs = {"a": (), "b": ("a:x",), "c": ("b:x",), "d": ("a:x",)}
        return [Node(k, "x", k, {"value": self.settings[k]}, self.runner, needs[k]) for k in needs]

    def run(self, **options: Any) -> Chain:
        self.ran.clear()
        chain = Chain(self.output, say=self.lines.append, **options)
        chain.execute(self.nodes(), LocalServices(self.output))  # type: ignore[arg-type]
        return chain

    def plan(self, **options: Any) -> dict[str, tuple[Action, str]]:
        return {d.node.stage: (d.action, d.reason) for d in Chain(self.output, **options).plan(self.nodes())}

    def out(self, chain: Chain, key: str) -> Path:
        return chain.done[key].directory / "out.txt"


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "chain")


def test_second_run_does_nothing_and_says_why(house: House) -> None:
    house.run()
    assert house.ran == ["a", "b", "c", "d"]
    house.run()
    assert house.ran == []
    assert all(action is Action.SKIP and "unchanged" in reason for action, reason in house.plan().values())


def test_changed_setting_reruns_the_node_and_what_depends_on_it(house: House) -> None:
    house.run()
    house.settings["b"] = 2
    assert house.plan()["b"] == (Action.RUN, "changed: value 1 -> 2")
    house.run()
    assert house.ran == ["b", "c"]


def test_a_node_that_passes_on_what_upstream_recorded_is_made_again_with_it(house: House) -> None:
    """As a page that shows validation accuracies, of a training that changed in how it validates alone."""

    def train(context: StageContext[str]) -> StageResult:
        (context.directory / "model").write_text("the same")
        return StageResult({"val_robust": house.settings["a"]}, ["model"])

    def tell(context: StageContext[str]) -> StageResult:
        house.ran.append(context.key)
        told = [done.record.payload["val_robust"] for done in context.upstream.values()]
        (context.directory / "page").write_text(str(told))
        return StageResult({}, ["page"])

    def run() -> Chain:
        house.ran.clear()
        nodes = [
            Node("pretrain", "x", "", {"value": house.settings["a"]}, one_by_one(train)),
            Node("evaluate", "x", "", {}, one_by_one(tell), ("pretrain:x",)),
            Node("report", "x", "", {}, one_by_one(tell), ("pretrain:x",), reads_records=True),
        ]
        chain = Chain(house.output, say=house.lines.append)
        chain.execute(nodes, LocalServices(house.output))  # type: ignore[arg-type]
        return chain

    run()
    house.settings["a"] = 2
    chain = run()
    assert house.ran == ["report:x"]
    assert (chain.done["report:x"].directory / "page").read_text() == "[2]"
    run()
    assert house.ran == []
    assert set(chain.done["evaluate:x"].record.inputs) == {"stage", "version", "sections", "upstream"}


def test_changing_back_finds_the_old_results(house: House) -> None:
    house.run()
    house.settings["a"] = 2
    house.run()
    house.settings["a"] = 1
    chain = house.run()
    assert house.ran == []
    for key, (directory, _) in chain.done.items():
        current = house.output / key.replace(":", "/") / "current.txt"
        assert current.read_text().strip() == directory.name, "infra/results.py would take the other one's"


def test_a_plan_says_nothing_of_what_the_chain_has_now(house: House) -> None:
    house.run()
    house.settings["a"] = 2
    house.run()
    before = {path: path.read_text() for path in house.output.glob("*/*/current.txt")}
    house.settings["a"] = 1
    assert {action for action, _ in house.plan().values()} == {Action.SKIP}
    assert {path: path.read_text() for path in house.output.glob("*/*/current.txt")} == before


def test_a_signal_after_a_node_is_settled_is_none_of_its_business(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[tuple[str, str]] = []

    @contextmanager
    def stage_run(services: LocalServices, key: str, *described: Any) -> Iterator[RecordingRun]:
        try:
            yield RecordingRun()
        except BaseException as error:
            ended.append((key, type(error).__name__))
            raise
        ended.append((key, "finished"))

    def say(line: str) -> None:
        if line.startswith("a:x") and "done" in line:
            raise KeyboardInterrupt

    monkeypatch.setattr(LocalServices, "stage_run", stage_run)
    runner = house.runner
    nodes = [Node(k, "x", k, {}, runner, together=True) for k in ("a", "d")]
    with pytest.raises(KeyboardInterrupt):
        Chain(house.output, say=say).execute(nodes, LocalServices(house.output))  # type: ignore[arg-type]
    assert ended == [("a:x", "finished"), ("d:x", "KeyboardInterrupt")]


def test_same_output_after_a_rerun_leaves_downstream_up_to_date(house: House) -> None:
    chain = house.run()
    house.out(chain, "a:x").unlink()
    house.run()
    assert house.ran == ["a"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "out.txt is missing"),
        (lambda path: path.write_text("X1(a1())"), "out.txt was altered"),
        (lambda path: path.write_text("longer than before"), "has 18 bytes"),
        (lambda path: path.unlink() or path.mkdir(), "out.txt"),
        (lambda path: (path.parent / "artifact.json").write_text("{"), "artifact.json is unreadable"),
    ],
)
def test_damaged_output_is_noticed_and_made_again(house: House, damage: Callable[[Path], Any], reason: str) -> None:
    chain = house.run()
    damage(house.out(chain, "b:x"))
    action, said = house.plan()["b"]
    assert action is Action.RUN
    assert reason in said
    house.run()
    assert house.ran == ["b"]
    assert house.out(chain, "b:x").read_text() == "b1(a1())"


def test_a_stage_that_goes_on_from_its_own_files_finds_no_damaged_one(house: House) -> None:
    def go_on(context: StageContext[str]) -> StageResult:
        for name in ("first.txt", "second.txt"):
            if not (context.directory / name).exists():
                (context.directory / name).write_text(f"{context.key} {name}")
        return StageResult({}, ["first.txt", "second.txt"])

    house.runner = one_by_one(go_on)
    directory = house.run().done["b:x"].directory
    for name, kept in (("first.txt", "second.txt"), ("second.txt", "first.txt")):
        written = (directory / kept).stat().st_mtime_ns
        (directory / name).write_text("damaged")
        house.run()
        assert (directory / name).read_text() == f"b:x {name}"
        assert (directory / kept).stat().st_mtime_ns == written


def test_failed_branch_blocks_what_needs_it_and_nothing_else(house: House) -> None:
    house.broken = {"b"}
    chain = house.run()
    assert house.ran == ["a", "d"]
    assert set(chain.failed) == {"b:x", "c:x"}
    assert "ValueError: b is broken" in chain.failed["b:x"]
    assert house.plan()["b"] == (Action.RESUME, "failed the last time: ValueError: b is broken")
    house.broken = set()
    house.run()
    assert house.ran == ["b", "c"]
    house.settings["b"] = 2
    house.broken = {"b"}
    house.run()
    assert house.plan()["b"] == (Action.RESUME, "failed the last time: ValueError: b is broken")


def test_interrupted_node_is_resumed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(contexts: Sequence[StageContext[str]]) -> Sequence[StageResult | Exception]:
        (contexts[0].directory / "half.txt").write_text("half")
        torn = temporary_name(contexts[0].directory / "blocks" / "block.npz")
        torn.parent.mkdir()
        torn.write_text("torn by a kill")
        raise KeyboardInterrupt

    whole = house.runner
    house.runner = interrupt
    with pytest.raises(KeyboardInterrupt):
        house.run()
    assert house.plan()["a"] == (Action.RESUME, "was interrupted")
    house.runner = whole
    chain = house.run()
    assert (chain.done["a:x"].directory / "half.txt").read_text() == "half"
    assert list((chain.done["a:x"].directory / "blocks").iterdir()) == []


def test_force_runs_again_and_keeps_the_old_result_aside(house: House) -> None:
    chain = house.run()
    house.run(force=["b"])
    assert house.ran == ["b"]
    directory = chain.done["b:x"].directory
    assert (directory.parent / f"{directory.name}.superseded-1" / "out.txt").is_file()


def test_stages_that_may_not_run_must_be_done(house: House) -> None:
    chain = house.run(only=["b", "c"])
    assert house.ran == []
    assert "not chosen to run" in chain.failed["a:x"]
    house.run()
    house.settings["b"] = 2
    house.run(only=["b", "c"])
    assert house.ran == ["b", "c"]


def test_a_plan_blocks_what_the_run_would_block(house: House) -> None:
    planned = house.plan(only=["b", "c"])
    assert planned["a"] == (Action.BLOCKED, "not done (first run) and not chosen to run")
    assert {stage: action for stage, (action, _) in planned.items()} == dict.fromkeys("abcd", Action.BLOCKED)
    assert set(house.run(only=["b", "c"]).failed) == {"a:x", "b:x", "c:x", "d:x"}


def test_a_stage_says_what_came_out(house: House) -> None:
    house.runner = one_by_one(lambda context: house._stage(context)._replace(said=f"all of {context.task}"))
    house.run()
    assert house.lines[1].endswith(" s: all of a")


def test_planning_writes_nothing(house: House) -> None:
    assert house.plan()["a"] == (Action.RUN, "first run")
    assert house.plan()["c"] == (Action.RUN, "after b:x")
    assert not house.output.exists()


def test_a_chain_keeps_others_out_between_two_executions_too(house: House) -> None:
    chain, other = Chain(house.output, say=house.lines.append), FileLock(house.output / ".lock")
    with chain.alone():
        chain.execute(house.nodes()[:2], LocalServices(house.output))  # type: ignore[arg-type]
        with pytest.raises(Timeout):
            other.acquire(timeout=0)
        chain.execute(house.nodes()[2:], LocalServices(house.output))  # type: ignore[arg-type]
    with other.acquire(timeout=0):
        assert house.ran == ["a", "b", "c", "d"]


def test_second_chain_on_the_same_output_refuses(house: House) -> None:
    house.output.mkdir(parents=True)
    with FileLock(house.output / ".lock"), pytest.raises(OutputLockedError, match="another one is running there"):
        house.run()
    assert house.ran == []
