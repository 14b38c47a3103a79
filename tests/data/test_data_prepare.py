"""prepare: once, whole, verified, and nothing written over what was there."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_sets import needs_ffcv, write_folder, write_npz

from pipeline.config.data import DataConfig, SplitLimits
from pipeline.data import DataError, FfcvMissingWarning, PreparedData, build, identity, open_split, prepare, publish
from pipeline.data.npz import npz_source
from pipeline.data.prepared import data_digest
from pipeline.data.sidecar import read_sidecar

pytestmark = pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")


@pytest.fixture
def without_ffcv(monkeypatch):
    """As on a machine where FFCV cannot be built."""
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.delitem(sys.modules, "pipeline.data.beton", raising=False)
    monkeypatch.delattr("pipeline.data.beton", raising=False)


def everything(prepared, split):
    with open_split(prepared, split, batch_size=1000) as loader:
        return next(iter(loader))


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".lock"}


def test_digits_are_split_relabelled_and_described(without_ffcv, tmp_path):
    with pytest.warns(FfcvMissingWarning, match=r"ffcv cannot be used here \(not installed\)"):
        prepared = prepare(DataConfig(classes=(5, 6, 7, 8, 9), image_size=16, channels=3), tmp_path, seed=0)
    assert (prepared.num_classes, prepared.class_names) == (5, ("5", "6", "7", "8", "9"))
    assert (prepared.channels, prepared.image_size) == (3, 16)
    assert sum(split.count for split in prepared.splits.values()) == 896
    x, y = everything(prepared, "train")
    assert x.shape == (prepared.splits["train"].count, 3, 16, 16)
    assert np.allclose(x.mean((0, 2, 3)), prepared.mean, atol=1e-5)
    assert np.allclose(x.std((0, 2, 3), correction=0), prepared.std, atol=1e-5)
    assert torch.bincount(y).tolist() == list(prepared.splits["train"].class_counts)
    assert torch.equal(x[:, 0], x[:, 1])


def test_without_ffcv_the_same_data_come_from_npz(rgb, rgb_npz):
    assert {Path(split.file).suffix for split in rgb.splits.values()} == {".beton"}
    assert {Path(split.file).suffix for split in rgb_npz.splits.values()} == {".npz"}
    assert rgb.digest == rgb_npz.digest
    for split in rgb.splits:
        assert all(torch.equal(a, b) for a, b in zip(everything(rgb, split), everything(rgb_npz, split), strict=True))


@pytest.mark.parametrize("settings", [{"loader": "ffcv"}, {"storage": "jpeg", "channels": 3}])
def test_without_ffcv_what_needs_it_is_refused(without_ffcv, tmp_path, settings):
    with pytest.raises(DataError, match=r"(needs ffcv|data.loader=ffcv).* cannot be used here \(not installed\)"):
        prepare(DataConfig(**settings), tmp_path, seed=0)


@pytest.fixture
def break_ffcv(monkeypatch, tmp_path):
    """Put an FFCV in front of the real one that raises when it is imported, here and in the writer's process."""

    def put(raised):
        (tmp_path / "broken" / "ffcv").mkdir(parents=True)
        (tmp_path / "broken" / "ffcv" / "__init__.py").write_text(f"raise {raised}")
        monkeypatch.syspath_prepend(str(tmp_path / "broken"))
        for name in [n for n in sys.modules if n.partition(".")[0] == "ffcv" or n == "pipeline.data.beton"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("pipeline.data.beton", raising=False)
        monkeypatch.setattr(build, "ffcv_installed", lambda: True)

    return put


@pytest.mark.parametrize("raised", ["ImportError('libopencv_core.so.406: gone')", "SystemError('another numpy')"])
def test_ffcv_that_does_not_import_is_told_and_replaced(break_ffcv, tmp_path, raised):
    break_ffcv(raised)
    with pytest.warns(FfcvMissingWarning, match=raised.partition("(")[0]):
        prepared = prepare(DataConfig(limit=SplitLimits(train=20, val=10, test=10)), tmp_path / "out", seed=0)
    assert prepared.splits["train"].file == "train.npz"
    again = prepare(DataConfig(limit=SplitLimits(train=20, val=10, test=10)), tmp_path / "out", seed=0)
    assert again == prepared


@needs_ffcv
def test_a_beton_that_can_no_longer_be_read_is_replaced(rgb, rgb_config, break_ffcv, tmp_path):
    shutil.copytree(rgb.directory, tmp_path / "out")
    break_ffcv("AttributeError('numba')")
    with pytest.raises(DataError, match=r"does not import here \(AttributeError: numba\)"):
        open_split(PreparedData.load(tmp_path / "out"), "train", batch_size=5)
    prepared = prepare(rgb_config, tmp_path / "out", seed=0)
    assert {split.file for split in prepared.splits.values()} == {"train.npz", "val.npz", "test.npz"}
    assert prepared.digest == rgb.digest
    assert len(everything(prepared, "train")[1]) == rgb.splits["train"].count


@needs_ffcv
def test_large_photographs_are_prepared_anew_for_the_loader_that_asks(tmp_path):
    root = write_folder(tmp_path / "images", images=6)
    config = DataConfig(dataset="folder", path=str(root), image_size=72, timeout=120)
    in_memory = config.model_copy(update={"loader": "memory"})
    for wanted, storage in ((config, "jpeg"), (in_memory, "raw"), (config, "jpeg")):
        prepared = prepare(wanted, tmp_path / "out", seed=0)
        assert prepared.storage == storage
        assert everything(prepared, "train")[0].shape[1:] == (3, 72, 72)
    before = (tmp_path / "out" / "train.beton").stat().st_mtime_ns
    assert prepare(config, tmp_path / "out", seed=0) == prepared
    assert (tmp_path / "out" / "train.beton").stat().st_mtime_ns == before


@pytest.mark.parametrize("storage", ["raw", "jpeg"])
def test_of_jpeg_the_digest_covers_the_size_that_is_loaded(storage):
    """Of raw pixels the contents do, and their digests stay as they are in networks that were trained on them."""
    digests = {
        data_digest(class_names=("a", "b"), storage=storage, quality=90, image_size=size, contents={"train": "c"})
        for size in (160, 224)
    }
    raw = "2e22a846edbf66e15bd4ab351c57402d89d28d0704f49a7a581b7e831e002436"
    assert digests == {raw} if storage == "raw" else len(digests) == 2


@pytest.mark.parametrize(
    ("settings", "version"),
    [
        ({"dataset": "folder"}, 2),
        ({"dataset": "folder", "loader": "memory"}, 2),
        ({"dataset": "npz", "storage": "jpeg"}, 2),
        ({"dataset": "folder", "image_size": 64}, None),
        ({"dataset": "folder", "channels": 1}, None),
        ({"dataset": "folder", "storage": "raw"}, None),
        ({"dataset": "npz"}, None),
    ],
)
def test_what_may_be_jpeg_with_a_digest_of_before_is_prepared_anew(settings, version):
    assert identity(DataConfig(path="nowhere", **settings), planning=True).get("version") == version


@needs_ffcv
def test_photographs_of_two_sizes_are_two_data_sets(photos, photos_config, tmp_path):
    smaller = prepare(photos_config.model_copy(update={"image_size": 32}), tmp_path / "out", seed=0)
    assert smaller.digest != photos.digest
    places = [publish(prepared.directory, (tmp_path / "mirror").as_uri()) for prepared in (photos, smaller)]
    shapes = [everything(PreparedData.load(place), "train")[0].shape[2:] for place in places]
    assert shapes == [(48, 48), (32, 32)]


def test_the_time_limit_holds_without_ffcv(without_ffcv, tmp_path):
    with pytest.raises(DataError, match=r"took longer than data\.timeout"):
        prepare(DataConfig(timeout=1e-6), tmp_path, seed=0)
    assert not list(tmp_path.glob(".building-*"))


def test_preparing_again_changes_nothing(rgb_npz, rgb_config, without_ffcv):
    before = {p: p.stat().st_mtime_ns for p in rgb_npz.directory.glob("*.npz*")}
    assert prepare(rgb_config, rgb_npz.directory, seed=0) == rgb_npz
    assert {p: p.stat().st_mtime_ns for p in rgb_npz.directory.glob("*.npz*")} == before


def test_the_digest_follows_the_data_and_not_the_place(rgb_config, rgb_npz, without_ffcv, tmp_path):
    copy = shutil.copy(rgb_config.path, tmp_path / "elsewhere.npz")
    moved = rgb_config.model_copy(update={"path": str(copy), "loader": "memory", "timeout": 9.0})
    assert prepare(moved, tmp_path / "a", seed=0).digest == rgb_npz.digest
    assert prepare(moved, tmp_path / "b", seed=1).digest != rgb_npz.digest
    write_npz(copy, test_images=np.zeros((20, 12, 12, 3), np.uint8))
    assert prepare(moved, tmp_path / "c", seed=0).digest != rgb_npz.digest


def test_a_changed_source_is_prepared_anew(without_ffcv, tmp_path):
    config = DataConfig(dataset="npz", path=str(write_npz(tmp_path / "x.npz")))
    first = prepare(config, tmp_path / "out", seed=0)
    write_npz(tmp_path / "x.npz", train_images=np.full((60, 12, 12, 3), 7, np.uint8))
    second = prepare(config, tmp_path / "out", seed=0)
    assert second.digest != first.digest
    assert everything(second, "train")[0].unique().tolist() == pytest.approx([7 / 255])


def test_prepared_data_can_be_moved(rgb_npz, tmp_path):
    place = tmp_path / "new" / "place"
    shutil.copytree(rgb_npz.directory, place)
    moved = PreparedData.load(place)
    moved.verify()
    assert moved.model_dump() == rgb_npz.model_dump()
    assert torch.equal(everything(moved, "val")[0], everything(rgb_npz, "val")[0])
    text = (place / "prepared.json").read_text() + (place / "train.npz.json").read_text()
    assert str(rgb_npz.directory) not in text
    assert os.uname().nodename not in text


def test_the_sidecar_keeps_the_indices_of_every_split(rgb_npz, rgb_config):
    with np.load(rgb_config.path) as source:
        images = source["train_images"]
    for split in ("train", "val"):
        sidecar = read_sidecar(rgb_npz.path(split))
        expected = torch.from_numpy(images[list(sidecar.indices)]).permute(0, 3, 1, 2) / 255
        assert torch.equal(everything(rgb_npz, split)[0], expected)
    assert not set(read_sidecar(rgb_npz.path("train")).indices) & set(read_sidecar(rgb_npz.path("val")).indices)


def test_groups_of_the_source_never_straddle(without_ffcv, tmp_path):
    groups = np.repeat(np.arange(100, 120), 3)
    labels = (groups % 2).astype(np.uint8)
    path = write_npz(tmp_path / "g.npz", train_labels=labels, train_groups=groups, test_labels=np.arange(20) % 2)
    prepared = prepare(DataConfig(dataset="npz", path=str(path), val_fraction=0.3), tmp_path / "out", seed=0)
    train, val = (set(groups[list(read_sidecar(prepared.path(s)).indices)]) for s in ("train", "val"))
    assert val
    assert not train & val


PREPARE = """
import json, sys, time, warnings
from pathlib import Path
from pipeline.config.data import DataConfig
from pipeline.data import build, prepare
warnings.simplefilter("ignore")
build.ffcv_installed = lambda: False
place, name = Path(sys.argv[1]), sys.argv[2]
real = build._build
def slowly(*arguments):
    (place / f"{name}.built").touch()
    time.sleep(1)
    real(*arguments)
build._build = slowly
(place / f"{name}.ready").touch()
while not (place / "go").exists():
    time.sleep(0.01)
print(json.dumps(prepare(DataConfig(), place / "out", seed=0).model_dump(mode="json")))
"""


def test_two_processes_at_once_prepare_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARE, str(tmp_path), name], env=environment, stdout=subprocess.PIPE, text=True
        )
        for name in "ab"
    ]
    while len(list(tmp_path.glob("*.ready"))) < 2:
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    (tmp_path / "go").touch()
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(list(tmp_path.glob("*.built"))) == 1
    assert json.loads(printed[0]) == json.loads(printed[1])


def test_what_a_killed_run_left_behind_is_cleared_away(without_ffcv, tmp_path):
    stale = tmp_path / ".building-123"
    stale.mkdir()
    (stale / "train.npz").write_bytes(b"half")
    prepare(DataConfig(limit=SplitLimits(train=20, val=10, test=10)), tmp_path, seed=0)
    assert not list(tmp_path.glob(".building-*"))


@needs_ffcv
def test_a_running_job_keeps_its_file_when_the_data_are_prepared_anew(rgb, rgb_config, tmp_path):
    shutil.copytree(rgb.directory, tmp_path, dirs_exist_ok=True)
    with open_split(PreparedData.load(tmp_path), "train", batch_size=5) as loader:
        running = iter(loader)
        first = next(running)[0]
        prepare(rgb_config.model_copy(update={"image_size": 4}), tmp_path, seed=0)
        kept = torch.cat([first, *(x for x, _ in running)])
    assert torch.equal(kept, everything(rgb, "train")[0])
    assert everything(PreparedData.load(tmp_path), "train")[0].shape[2:] == (4, 4)


BAD_NPZ = {
    "missing array": ({"test_labels": None}, "test_labels missing"),
    "float images": (
        {"train_images": np.zeros((60, 4, 4, 3))},
        r"expected train_images uint8 \(N, H, W\[, 3\]\), got fl",
    ),
    "two channels": ({"train_images": np.zeros((60, 4, 4, 2), np.uint8)}, "expected train_images uint8"),
    "no images": ({"train_images": np.zeros((0, 4, 4, 3), np.uint8)}, "expected train_images uint8"),
    "too few labels": (
        {"train_labels": np.zeros(59, int)},
        r"train_images has \(60,\) entries, train_labels has \(59,\)",
    ),
    "too few groups": ({"train_groups": np.zeros(9, int)}, r"train_groups has \(9,\)"),
    "sizes differ": ({"test_images": np.zeros((20, 9, 9, 3), np.uint8)}, "expected the same size and channels"),
    "label too high": ({"class_names": np.array(["a", "b"])}, "labels from 0 to 1, got 2 at position 2"),
    "test label too high": ({"test_labels": np.full(20, 3)}, "test_labels: expected labels from 0 to 2, got 3"),
    "negative label": ({"train_labels": np.full(60, -1)}, "got -1 at position 0"),
    "float labels": ({"train_labels": np.zeros(60)}, "expected integer labels"),
    "absurd label": ({"train_labels": np.full(60, 10**9)}, "fewer than 100000 classes"),
    "empty class": ({"train_labels": np.arange(60) % 2 * 2}, "of every class, got none of 1"),
    "objects": ({"train_labels": np.array([{}] * 60)}, "not a plain numeric array"),
    "not square": (
        {"train_images": np.zeros((60, 4, 5, 3), np.uint8), "test_images": np.zeros((20, 4, 5, 3), np.uint8)},
        "set data.image_size",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz_is_one_readable_error_and_leaves_what_was_there(rgb_npz, tmp_path, changes, message):
    shutil.copytree(rgb_npz.directory, tmp_path / "out")
    before = contents(tmp_path / "out")
    config = DataConfig(dataset="npz", path=str(write_npz(tmp_path / "bad.npz", **changes)))
    with pytest.raises(DataError, match=message) as caught:
        prepare(config, tmp_path / "out", seed=0)
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "out").glob(".building-*"))


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken\.npz: expected an .npz file with train_images"):
        prepare(DataConfig(dataset="npz", path=str(path)), tmp_path / "out", seed=0)


def test_a_missing_file_names_the_places_looked_at(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARTA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=f"no such file or folder; looked at .*{tmp_path}.*SPARTA_DATA"):
        prepare(DataConfig(dataset="npz", path="nowhere.npz"), tmp_path / "out", seed=0)


def test_an_npz_larger_than_memory_is_read_with_little(tmp_path):
    """123 MB here; what is mapped of it is given back on the way."""
    images, labels = np.ones((40_000, 32, 32, 3), np.uint8), np.arange(40_000) % 2
    path = write_npz(tmp_path / "x.npz", train_images=images, train_labels=labels, size=32, classes=2)
    del images
    train = npz_source(DataConfig(dataset="npz", path=str(path))).splits["train"].images
    before, peak = psutil.Process().memory_info().rss, 0
    for index in range(len(train)):
        assert train[index][0, 0, 0] == 1
        if index % 500 == 0:
            peak = max(peak, psutil.Process().memory_info().rss)
    assert peak - before < 60e6


def test_a_relative_path_is_found_in_sparta_data(monkeypatch, without_ffcv, tmp_path):
    monkeypatch.setenv("SPARTA_DATA", str(tmp_path))
    write_npz(tmp_path / "mine.npz")
    assert prepare(DataConfig(dataset="npz", path="mine.npz"), tmp_path / "out", seed=0).name == "mine"


def test_loading_what_is_not_prepared_says_so(tmp_path):
    with pytest.raises(DataError, match=r"expected prepared data \(prepared.json\) in .* on .*, found none"):
        PreparedData.load(tmp_path)
    (tmp_path / "prepared.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        PreparedData.load(tmp_path)
    (tmp_path / "prepared.json").write_text("{}")
    with pytest.raises(DataError, match="run the prepare stage again"):
        PreparedData.load(tmp_path)
