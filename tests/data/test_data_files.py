"""What is opened is what was written: every kind of damage is one readable error that says how to rebuild."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from data_sets import edit_sidecar, needs_ffcv, vouch_for, write_npz

from pipeline.artifacts import sha256_of
from pipeline.config.data import DataConfig
from pipeline.data import DataError, FfcvMissingWarning, PreparedData, open_split, prepare
from pipeline.data.sidecar import (
    _BLOCK,
    _NUM_BLOCKS,
    _offsets,
    cache_root,
    check_file,
    read_sidecar,
    sidecar_path,
)
from sparta_models import kernels


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1000)


def alter(path, offset=None):
    """Change one byte, and put size and time stamp back."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(stat.st_size // 3 if offset is None else offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 255]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def half_written(path):
    """As a writer leaves it that is killed: all the size, zeros at the end."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size - path.stat().st_size // 2))


def foreign(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def foreign_but_vouched_for(path):
    foreign(path)
    vouch_for(path)


def other_fields(path):
    edit_sidecar(path, fields={"image": "NDArrayField", "label": "FloatField"})


def too_short_index(path):
    edit_sidecar(path, count=40)


def other_version(path):
    edit_sidecar(path, format_version=99)


def incomplete_sidecar(path):
    place = sidecar_path(path)
    content = json.loads(place.read_text())
    del content["class_counts"]
    place.write_text(json.dumps(content))


DAMAGE = {
    "truncated": (truncate, r"expected [\d,]+ bytes, got [\d,]+ \(truncated or half-written\)"),
    "zero bytes": (lambda path: path.write_bytes(b""), "got 0"),
    "altered": (alter, r"\(altered\)"),
    "altered at the end": (lambda path: alter(path, path.stat().st_size - 1), r"\(altered\)"),
    "half-written": (half_written, r"\(altered\)"),
    "foreign": (foreign, r"\(altered\)"),
    "missing file": (lambda path: path.unlink(), "no such file, though its sidecar is here"),
    "missing sidecar": (lambda path: sidecar_path(path).unlink(), "sidecar train.beton.json is missing"),
    "sidecar is not JSON": (lambda path: sidecar_path(path).write_text("{"), "expected a JSON sidecar"),
    "sidecar of another version": (other_version, "expected sidecar format 1, got 99"),
    "sidecar lacks an entry": (incomplete_sidecar, "class_counts: expected a value, got none"),
    "of another preparation": (lambda path: edit_sidecar(path, content="0" * 64), "from another preparation"),
    "wrong fields": (other_fields, "expected the fields {'image': 'NDArrayField'"),
    "wrong count": (too_short_index, "count or labels differ from its sidecar"),
    "foreign with a matching sidecar": (foreign_but_vouched_for, "not a .beton file that FFCV can open"),
}


@needs_ffcv
@pytest.mark.parametrize("verified_before", [False, True], ids=["first", "again"])
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_at_opening(rgb, tmp_path, damage, message, verified_before):
    shutil.copytree(rgb.directory, tmp_path, dirs_exist_ok=True)
    prepared = PreparedData.load(tmp_path)
    if verified_before:
        open_split(prepared, "train", batch_size=5).close()
    damage(prepared.path("train"))
    with pytest.raises(DataError, match=message) as caught:
        open_split(PreparedData.load(tmp_path), "train", batch_size=5)
    assert "prepare" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_jpeg_is_an_error_and_not_garbage(photos, tmp_path):
    from pipeline.data.augment import center_boxes
    from pipeline.data.readers import open_reader

    path = tmp_path / "train.beton"
    shutil.copy(photos.path("train"), path)
    sidecar = read_sidecar(photos.path("train"))
    reader = open_reader(path, sidecar)
    start, size, boxes = int(reader._starts[3]), int(reader._sizes[3]), center_boxes(reader.shapes)
    reader.close()
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(size))
    reader = open_reader(path, sidecar)
    with pytest.raises(DataError, match="image 3 does not decode"):
        reader.read(np.array([1, 3, 2]), boxes[[1, 3, 2]])
    assert reader.read(np.array([1, 2]), boxes[[1, 2]]).shape == (2, 48, 48, 3)
    reader.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "truncated"), (alter, "altered"), (lambda path: sidecar_path(path).unlink(), "is missing")],
)
def test_damaged_npz_is_found_at_opening(rgb_npz, tmp_path, damage, message):
    shutil.copytree(rgb_npz.directory, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "train.npz")
    with pytest.raises(DataError, match=message):
        open_split(PreparedData.load(tmp_path), "train", batch_size=5)


def test_npz_with_other_arrays_is_refused(rgb_npz, tmp_path):
    shutil.copytree(rgb_npz.directory, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "train.npz"
    with path.open("wb") as file:
        np.savez(file, images=np.zeros((45, 12, 12, 3), np.float32), labels=np.zeros(45, int))
    vouch_for(path)
    with pytest.raises(DataError, match="images or labels differ from its sidecar"):
        open_split(PreparedData.load(tmp_path), "train", batch_size=5)


def test_the_whole_file_is_read_once_per_machine(rgb_npz, tmp_path, monkeypatch):
    path = tmp_path / "train.npz"
    for source in (rgb_npz.path("train"), sidecar_path(rgb_npz.path("train"))):
        shutil.copy(source, tmp_path)
    read = []
    monkeypatch.setattr("pipeline.data.sidecar.sha256_of", lambda p: read.append(p) or sha256_of(p))
    sidecar = read_sidecar(path)
    check_file(path, sidecar)
    check_file(path, sidecar)
    assert len(read) == 1
    os.utime(path)
    check_file(path, sidecar)
    assert len(read) == 2


def test_a_receipt_is_of_one_machine(rgb_npz, tmp_path, monkeypatch):
    """With a home that machines share, the same path may be another file elsewhere."""
    read = []
    monkeypatch.setattr("pipeline.data.sidecar.sha256_of", lambda p: read.append(p) or sha256_of(p))
    for source in (rgb_npz.path("train"), sidecar_path(rgb_npz.path("train"))):
        shutil.copy(source, tmp_path)
    for machine in ("one", "two", "one", "two"):
        monkeypatch.setattr(os, "uname", lambda name=machine: SimpleNamespace(nodename=name))
        check_file(tmp_path / "train.npz", read_sidecar(tmp_path / "train.npz"))
    assert len(read) == 2


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Files with bytes between the sampled blocks."""
    place = tmp_path_factory.mktemp("large")
    config = DataConfig(dataset="npz", path=str(write_npz(place / "large.npz", size=64)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.build.ffcv_installed", lambda: False)
        with pytest.warns(FfcvMissingWarning):
            return prepare(config, place / "out", seed=0)


def alter_between_samples(path):
    offsets = list(_offsets(path.stat().st_size, _NUM_BLOCKS))
    assert offsets[30] + 2 * _BLOCK < offsets[31]
    alter(path, offsets[30] + _BLOCK + 100)


def test_a_byte_that_no_sample_covers_is_found_the_first_time(large, tmp_path):
    shutil.copytree(large.directory, tmp_path, dirs_exist_ok=True)
    alter_between_samples(tmp_path / "train.npz")
    with pytest.raises(DataError, match="its sha256 is not the one in its sidecar"):
        open_split(PreparedData.load(tmp_path), "train", batch_size=5)


def test_a_byte_that_no_sample_covers_is_found_when_the_time_stamp_changed(large, tmp_path):
    shutil.copytree(large.directory, tmp_path, dirs_exist_ok=True)
    prepared = PreparedData.load(tmp_path)
    open_split(prepared, "train", batch_size=5).close()
    alter_between_samples(tmp_path / "train.npz")
    os.utime(tmp_path / "train.npz")
    with pytest.raises(DataError, match="its sha256 is not the one in its sidecar"):
        open_split(prepared, "train", batch_size=5)


def test_full_verification_finds_what_a_quick_look_cannot(large, tmp_path):
    shutil.copytree(large.directory, tmp_path, dirs_exist_ok=True)
    prepared = PreparedData.load(tmp_path)
    prepared.verify()
    alter_between_samples(prepared.path("train"))  # size and time stamp as before
    prepared.check("train")
    with pytest.raises(DataError, match="its sha256 is not the recorded one"):
        prepared.verify()


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, "home/.cache/sparta"),
        ({"XDG_CACHE_HOME": "~/elsewhere"}, "home/elsewhere/sparta"),
        ({"XDG_CACHE_HOME": "~/elsewhere", "SPARTA_CACHE": "~/own"}, "home/own"),
    ],
)
def test_data_and_kernels_share_one_cache(environment, place, tmp_path, monkeypatch):
    for name in ("SPARTA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": str(tmp_path / "home"), **environment}.items():
        monkeypatch.setenv(name, value)
    assert cache_root() == kernels.cache_root() == tmp_path / place


def test_a_cache_that_cannot_be_written_only_costs_time(rgb_npz, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path / "file" / "below"))
    with open_split(rgb_npz, "train", batch_size=5) as loader:
        assert len(list(loader)) == 9
