"""Records and digests: equal inputs have equal names, files are whole or absent."""

import os
from pathlib import Path

import pytest

from pipeline import artifacts


def test_fingerprint_depends_on_values_and_not_on_their_order() -> None:
    assert artifacts.fingerprint({"a": 1, "b": [1, 2]}) == artifacts.fingerprint({"b": [1, 2], "a": 1})
    assert artifacts.fingerprint({"a": 1}) != artifacts.fingerprint({"a": 2})


def test_large_file_is_digested_by_blocks_and_notices_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_FULL_HASH_LIMIT", 1 << 21)
    path = tmp_path / "large"
    path.write_bytes(os.urandom((1 << 21) + 12345))
    before = artifacts.digest_file(path)
    assert artifacts.digest_file(path) == before
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert artifacts.digest_file(path) != before


def test_failed_write_leaves_the_old_text_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "record.json"
    artifacts.write_atomic(path, "old")

    def no_space(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        artifacts.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_is_readable_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        artifacts.write_atomic(tmp_path / "shared.json", "{}")
    finally:
        os.umask(before)
    assert (tmp_path / "shared.json").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["../other.txt", "/etc/hostname", "model/../../other.txt"])
def test_a_record_that_names_files_elsewhere_is_none(name: str, tmp_path: Path) -> None:
    outputs = {name: artifacts.FileDigest(size=1, sha256="0" * 64)}
    record = artifacts.StageRecord.model_construct(
        stage="a", branch="x", fingerprint="f", inputs={}, payload={}, outputs=outputs, output_digest="d"
    )
    artifacts.save_record(tmp_path, record)
    assert artifacts.load_record(tmp_path) is None


def test_changes_are_named_with_both_values() -> None:
    changes = artifacts.changed_inputs({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": None})
    assert changes == ["a.b 1 -> 3"]


@pytest.mark.parametrize("content", ["", "{", '{"stage": 1}', "\x00"])
def test_unreadable_record_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / artifacts.RECORD).write_text(content)
    assert artifacts.load_record(tmp_path) is None


def test_runs_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARTA_RUNS", str(tmp_path / "elsewhere"))
    assert artifacts.runs_root() == tmp_path / "elsewhere"
    monkeypatch.delenv("SPARTA_RUNS")
    monkeypatch.chdir(tmp_path)
    assert artifacts.runs_root() == tmp_path / "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert artifacts.runs_root() == Path.home() / "sparta-runs"
