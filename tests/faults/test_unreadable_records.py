"""A record that is damaged to the last byte is one that is not there: what it stands for is done again."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifacts import load_record
from pipeline.cluster.outcome import load_outcome
from pipeline.cluster.sweep.trials import load_trials
from pipeline.tracking.__main__ import main
from pipeline.tracking.spool import RunRecord, Spool, target_name

NOT_UTF8 = b'{"run": "\xff"}'


@pytest.mark.parametrize(
    ("name", "read", "nothing"),
    [
        ("outcome.json", lambda root: load_outcome(root, "run"), None),
        ("artifact.json", load_record, None),
        ("trials/0000/trial.json", load_trials, []),
        (f"tracking/delivered/{target_name('x')}/k.json", lambda root: Spool(root).delivered("x", "k").run_id, None),
        ("tracking/runs/k.json", lambda root: Spool(root).records(), []),
    ],
)
@pytest.mark.parametrize("content", [NOT_UTF8, b"", b"[]"])
def test_a_damaged_record_is_none(
    name: str, read: Callable[[Path], Any], nothing: object, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == nothing


def test_a_run_that_cannot_be_read_is_named_and_costs_no_other_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    spool = Spool(tmp_path)
    whole = spool.save(RunRecord(key="whole", name="demo", started=1))
    (spool.directory / "runs" / "torn.json").write_bytes(NOT_UTF8)
    with caplog.at_level(logging.WARNING):
        assert spool.records() == spool.records() == [whole]
    assert caplog.text.count("is passed over: ") == 1
    assert main(["status", str(tmp_path)]) == 2
    assert "torn.json: " in capsys.readouterr().err
    assert "torn.json: " in caplog.text
