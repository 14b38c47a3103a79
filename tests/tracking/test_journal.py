import math
import os
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tracking import Journal, read_history, read_journal


def test_what_is_logged_is_read_back(tmp_path: Path):
    with Journal(tmp_path / "new" / "metrics.jsonl") as journal:
        journal.log({"loss": 0.5, "accuracy": 0.25}, step=1)
        journal.log({"loss": 0.25}, step=2)
    assert read_history(journal.path) == {"loss": [(1, 0.5), (2, 0.25)], "accuracy": [(1, 0.25)]}


def test_non_finite_values_survive(tmp_path: Path):
    with Journal(tmp_path / "metrics.jsonl") as journal:
        journal.log({"up": math.inf, "down": -math.inf, "none": math.nan}, step=0)
    history = read_history(journal.path)
    assert history["up"] == [(0, math.inf)]
    assert history["down"] == [(0, -math.inf)]
    assert math.isnan(history["none"][0][1])


def test_a_resumed_run_adds_only_what_is_new(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        for step in range(5):
            journal.log({"loss": step}, step)
    with Journal(path) as journal:
        for step in range(3, 8):
            journal.log({"loss": 100 + step, "extra": step}, step)
    history = read_history(path)
    assert history["loss"] == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 105), (6, 106), (7, 107)]
    assert [step for step, _ in history["extra"]] == [3, 4, 5, 6, 7]


def test_a_torn_last_line_is_dropped_and_written_again(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log({"loss": 1}, 1)
        journal.log({"loss": 2}, 2)
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert read_history(path) == {"loss": [(1, 1.0)]}
        with Journal(path) as journal:
            journal.log({"loss": 2}, 2)
        assert read_history(path) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_a_reader_takes_up_where_it_stopped(tmp_path: Path):
    with Journal(tmp_path / "metrics.jsonl") as journal:
        journal.log({"loss": 1}, 1)
        first, offset = read_journal(journal.path)
        journal.log({"loss": 2}, 2)
        second, end = read_journal(journal.path, offset)
    assert [entry.step for entry in first + second] == [1, 2]
    assert end == journal.path.stat().st_size


def test_time_never_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log({"loss": 1}, 1)
    monkeypatch.setattr(time, "time_ns", lambda: 10**15)  # 1970
    with Journal(path) as journal:
        journal.log({"loss": 2}, 2)
    times = [entry.time for entry in read_journal(path)[0]]
    assert times == sorted(times)


def test_a_full_disk_leaves_whole_lines_and_the_call_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.pwrite
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.log({"loss": 1}, 1)
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    with pytest.raises(OSError, match="disk full"):
        journal.log({"loss": 2}, 2)
    monkeypatch.undo()
    assert read_history(journal.path) == {"loss": [(1, 1.0)]}
    journal.log({"loss": 2}, 2)
    journal.close()
    assert read_history(journal.path) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_a_damaged_line_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = tmp_path / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log({"loss": 1}, 1)
    with path.open("ab") as file:
        file.write(b'{"step": 2}\n[]\n\xff\n')
    with Journal(path) as journal:
        journal.log({"loss": 3}, 3)
    assert read_history(path)["loss"] == [(1, 1.0), (3, 3.0)]
    assert "no journal entry" in caplog.text


def test_a_missing_journal_is_empty(tmp_path: Path):
    assert read_journal(tmp_path / "none.jsonl") == ([], 0)


@settings(max_examples=150)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_without_an_error_and_can_be_appended_to(
    data: bytes, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("fuzz") / "metrics.jsonl"
    path.write_bytes(data)
    before = len(read_journal(path)[0])
    with Journal(path) as journal:
        journal.log({"a key that is nowhere else": 1}, 10**6)
    assert len(read_journal(path)[0]) == before + 1
