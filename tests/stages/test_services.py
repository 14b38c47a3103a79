"""What a chain's stages share, and in which order it ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.chain import Chain
from pipeline.config.load import load_config
from pipeline.run import Terminated
from pipeline.stages import services as services_module
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.services import Services
from pipeline.tracking.spool import Spool, latest


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (KeyboardInterrupt, ["mlflow, killed", "ray"]),
        (Terminated, ["mlflow, killed", "ray"]),
        (ValueError, ["ray", "mlflow"]),
        (None, ["ray", "mlflow"]),
    ],
)
def test_after_a_signal_mlflow_is_told_before_ray_stops(
    error: type[BaseException] | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    @contextmanager
    def ensure_ray(*_: object, **__: object) -> Iterator[None]:
        try:
            yield
        finally:
            ended.append("ray")

    monkeypatch.setattr(services_module, "ensure_ray", ensure_ray)
    monkeypatch.setattr(services_module, "preflight", lambda *_: None)
    services = Services(load_config("demo", ["tracking.enabled=false"]), tmp_path)
    close = lambda *, killed: ended.append("mlflow, killed" if killed else "mlflow")  # noqa: E731
    monkeypatch.setattr(services.tracker, "close", close)
    try:
        with services:
            services.ray()
            if error is not None:
                raise error
    except (KeyboardInterrupt, Terminated, ValueError) as raised:
        assert type(raised) is error  # noqa: PT017
    assert ended == expected


def test_other_targets_are_another_run_of_the_chain(tmp_path: Path) -> None:
    def chain_run(*changes: str) -> tuple[str, dict[str, str]]:
        run = Services(load_config("demo", ["tracking.enabled=false", *changes]), tmp_path).chain_run
        return run.key, run.tracker.spool.load(run.key).params

    first, params = chain_run()
    assert params["transfer.digits-5-9.data.classes"] == "[5, 6, 7, 8, 9]"
    assert chain_run()[0] == first
    assert chain_run("transfer=[{name: deeper, model: {name: resnet20}}]")[0] != first


def test_after_a_change_back_the_lineage_names_the_run_whose_result_is_used(tmp_path: Path) -> None:
    def write(context: StageContext[None]) -> StageResult:
        (context.directory / "out").write_text(context.key)
        return StageResult({}, ["out"])

    runner = one_by_one(write)

    def run(setting: str, *stages: str) -> Spool:
        needs = {"pretrain": (), "freeze": ("pretrain:x",)}
        nodes = [Node(stage, "x", None, {"setting": setting}, runner, needs[stage]) for stage in stages]
        with Services(load_config("demo", ["tracking.enabled=false"]), tmp_path) as services:
            Chain(services.output, say=lambda line: None).execute(nodes, services)
        return services.tracker.spool

    first = latest(run("a", "pretrain").records(), "pretrain:x", parents=False)
    run("b", "pretrain")
    frozen = latest(run("a", "pretrain", "freeze").records(), "freeze:x", parents=False)
    assert first is not None
    assert frozen is not None
    assert frozen.upstream == {"pretrain:x": first.key}
