"""Files that are elsewhere: URLs, a mirror, a copy per node. Fsspec's memory and file systems stand for a store."""

import errno
import importlib.util
import shutil
import threading
import uuid
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from data_sets import vouch_for, write_npz
from fsspec.spec import AbstractFileSystem

from pipeline.config.data import DataConfig
from pipeline.data import DataError, PreparedData, open_split, prepare
from pipeline.data.errors import DataUnreachableError
from pipeline.data.paths import as_url
from pipeline.data.remote import copy_to_node, fetch_file, publish
from pipeline.data.sidecar import sidecar_path

pytestmark = pytest.mark.filterwarnings("ignore::pipeline.data.errors.FfcvMissingWarning")


@pytest.fixture
def bucket():
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    store = fsspec.filesystem("memory")
    if store.exists(url):
        store.rm(url, recursive=True)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("pipeline.data.build.ffcv_installed", lambda: False)


def train_images(prepared):
    with open_split(prepared, "train", batch_size=1000) as loader:
        return next(iter(loader))[0]


@pytest.mark.parametrize("url", ["s3://bucket/a/b", "gs://bucket", "file:///a/b"])
def test_a_url_is_known_even_after_it_was_a_path(url):
    assert as_url(url) == as_url(Path(url)) == url


@pytest.mark.parametrize("path", ["a/b", "/a/b", "C:/a", "./odd/name:/x"])
def test_a_path_is_no_url(path):
    assert as_url(path) is None


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_an_npz_behind_a_url_is_a_source(tmp_path, bucket, scheme):
    local = write_npz(tmp_path / "far.npz")
    url = f"{bucket}/far.npz" if scheme == "memory" else local.as_uri()
    if scheme == "memory":
        fsspec.filesystem("memory").put_file(str(local), url)
    prepared = prepare(DataConfig(dataset="npz", path=url), tmp_path / "out", seed=0)
    assert prepared.digest == prepare(DataConfig(dataset="npz", path=str(local)), tmp_path / "b", seed=0).digest


def test_a_url_that_cannot_be_read_is_named(bucket):
    fsspec.filesystem("memory").pipe(f"{bucket}/other", b"")
    with pytest.raises(DataError, match=r"nothing\.npz: cannot be read"):
        fetch_file(f"{bucket}/nothing.npz")
    with pytest.raises(DataError, match="nosuchscheme"):
        fetch_file("nosuchscheme://x/y.npz")


class ForbiddenError(Exception):
    """As botocore's ClientError: no OSError, no ValueError."""


class Refusing(AbstractFileSystem):
    protocol, cachable = "refusing", False

    def info(self, path, **_):
        raise ForbiddenError("An error occurred (403) when calling\nthe HeadObject operation")


class Cutting(AbstractFileSystem):
    """Says how large a file is, and sends half of it."""

    protocol, cachable = "cutting", False

    def info(self, path, **_):
        return {"name": path, "size": 100, "type": "file"}

    def get_file(self, remote, local, **_):
        Path(local).write_bytes(b"x" * 50)


@pytest.fixture
def backends():
    for kind in (Refusing, Cutting):
        fsspec.register_implementation(kind.protocol, kind, clobber=True)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (fetch_file, r"refusing://b/x: cannot be read \(ForbiddenError: An error occurred \(403\)"),
        (PreparedData.load, r"refusing://b/x: cannot be read \(ForbiddenError"),
        (None, r"data\.mirror=refusing://b/x: cannot be written \(ForbiddenError"),
    ],
    ids=["file", "prepared", "mirror"],
)
def test_whatever_a_backend_raises_is_one_line_with_what_to_do(backends, rgb_npz, use, message):
    with pytest.raises(DataError, match=message) as caught:
        publish(rgb_npz.directory, "refusing://b/x") if use is None else use("refusing://b/x")
    assert "check the address and your credentials" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "again"), [(TimeoutError("503 Slow Down"), True), (FileNotFoundError("no key"), False)]
)
def test_what_another_try_may_have_is_told_from_what_is_not_there(backends, monkeypatch, error, again):
    def info(*_, **__):
        raise error

    monkeypatch.setattr(Refusing, "info", info)
    with pytest.raises(DataError) as caught:
        fetch_file("refusing://b/x")
    assert isinstance(caught.value, DataUnreachableError) == again


def test_a_node_cache_that_cannot_be_is_a_lasting_mistake(rgb_npz, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.node_cache=") as caught:
        copy_to_node(rgb_npz.path("train"), tmp_path / "file" / "cache")
    assert not isinstance(caught.value, DataUnreachableError)


@pytest.mark.parametrize(("url", "package"), [("s3://b/x.npz", "s3fs"), ("gs://b/x.npz", "gcsfs")])
def test_a_missing_backend_is_named(url, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(DataError, match=f"{url}: cannot be read .*{package}"):
        fetch_file(url)


def test_a_file_that_is_cut_on_its_way_is_refused_and_leaves_nothing(backends, tmp_path):
    with pytest.raises(DataError, match="expected 100 bytes, got 50"):
        fetch_file("cutting://b/x.npz")
    assert {path.name for path in (tmp_path / "cache" / "fetched").rglob("*") if path.is_file()} == {".lock"}


def test_a_fetched_file_that_was_cut_is_fetched_again(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"whole")
    fetch_file((tmp_path / "x.npz").as_uri()).write_bytes(b"wh")
    assert fetch_file((tmp_path / "x.npz").as_uri()).read_bytes() == b"whole"


def test_a_folder_behind_a_url_is_no_file(tmp_path):
    with pytest.raises(DataError, match="expected a file, got a folder"):
        fetch_file(tmp_path.as_uri())


def test_a_changed_remote_file_is_fetched_again(tmp_path):
    place = tmp_path / "x.npz"
    place.write_bytes(b"one")
    first = fetch_file(place.as_uri())
    assert fetch_file(place.as_uri()) == first
    place.write_bytes(b"three")
    assert fetch_file(place.as_uri()).read_bytes() == b"three"


def test_prepared_data_are_read_from_the_mirror_on_a_node_that_has_nothing(rgb_config, bucket, tmp_path):
    config = rgb_config.model_copy(update={"mirror": bucket})
    here = prepare(config, tmp_path / "here", seed=0)
    images = train_images(here)
    shutil.rmtree(here.directory)
    with pytest.raises(DataError, match=r"for several nodes use a shared folder, or set data\.mirror"):
        PreparedData.load(here.directory)
    there = PreparedData.load(Path(bucket) / here.digest[:16])
    assert there.digest == here.digest
    assert torch.equal(train_images(there), images)
    assert PreparedData.load(f"{bucket}/{here.digest[:16]}").directory == there.directory


def test_a_file_that_does_not_arrive_whole_is_refused(rgb_npz, bucket):
    place = publish(rgb_npz.directory, bucket)
    store = fsspec.filesystem("memory")
    content = store.cat_file(f"{place}/train.npz")
    store.pipe(f"{place}/train.npz", content[:-100])
    with pytest.raises(DataError, match="truncated or half-written"):
        PreparedData.load(place)


@pytest.mark.parametrize("name", ["train.npz", "val.npz.json", "prepared.json"])
def test_what_is_damaged_on_the_node_is_fetched_again(rgb_npz, bucket, name):
    place = publish(rgb_npz.directory, bucket)
    folder = PreparedData.load(place).directory
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    again = PreparedData.load(place)
    assert again.directory == folder
    again.verify()
    assert again.model_dump() == rgb_npz.model_dump()


@pytest.mark.parametrize("storage", ["raw", "jpeg"])
def test_beton_files_are_read_through_a_mirror_and_a_node_cache(rgb, photos, storage, bucket, tmp_path):
    prepared = {"raw": rgb, "jpeg": photos}[storage]
    images = train_images(prepared)
    there = PreparedData.load(publish(prepared.directory, bucket))
    assert there.path("train").name == "train.beton"
    assert torch.equal(train_images(there), images)
    cached = there.model_copy(update={"node_cache": tmp_path / "node"})
    assert torch.equal(train_images(cached), images)
    assert len(list((tmp_path / "node").glob("*/train.beton"))) == 1


def test_data_that_lie_in_the_mirror_whole_are_not_written_over(rgb_npz, bucket, tmp_path):
    """Another preparation of the same data has other bytes: two of FFCV's writers race for pages."""
    place = publish(rgb_npz.directory, bucket)
    shutil.copytree(rgb_npz.directory, tmp_path / "other")
    with zipfile.ZipFile(tmp_path / "other" / "train.npz", "a") as archive:
        archive.comment = b"other bytes, same arrays"
    vouch_for(tmp_path / "other" / "train.npz")
    record = tmp_path / "other" / "prepared.json"
    record.write_text(record.read_text().replace('"loader": "auto"', '"loader": "memory"'))
    PreparedData.load(tmp_path / "other").verify()
    assert publish(tmp_path / "other", bucket) == place
    store = fsspec.filesystem("memory")
    assert store.cat_file(f"{place}/train.npz") == rgb_npz.path("train").read_bytes()
    there = PreparedData.load(place)
    there.verify()
    assert there.loader == "memory"


def test_what_is_damaged_in_the_mirror_is_sent_again(rgb_npz, bucket):
    place = publish(rgb_npz.directory, bucket)
    store = fsspec.filesystem("memory")
    store.pipe_file(f"{place}/train.npz", b"cut")
    store.rm(f"{place}/val.npz.json")
    publish(rgb_npz.directory, bucket)
    PreparedData.load(place).verify()


def test_two_data_sets_in_one_mirror_do_not_meet(rgb_npz, bucket, tmp_path):
    path = write_npz(tmp_path / "other.npz", train=66)
    other = prepare(DataConfig(dataset="npz", path=str(path)), tmp_path / "other", seed=0)
    places = [publish(prepared.directory, bucket) for prepared in (rgb_npz, other)]
    assert [PreparedData.load(place).digest for place in places] == [rgb_npz.digest, other.digest]


def test_publishing_twice_sends_nothing_anew(rgb_npz, bucket, monkeypatch):
    publish(rgb_npz.directory, bucket)
    sent = []
    store = type(fsspec.filesystem("memory"))
    for way in ("put_file", "pipe_file"):
        monkeypatch.setattr(store, way, lambda self, *arguments, **_: sent.append(arguments))
    publish(rgb_npz.directory, bucket)
    assert sent == []


def test_a_mirror_that_cannot_be_written_is_named(rgb_npz, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.mirror=.* cannot be written"):
        publish(rgb_npz.directory, (tmp_path / "file" / "below").as_uri())


def test_a_node_copies_a_file_once(rgb_npz, tmp_path, monkeypatch):
    copies = []
    real = shutil.copyfile
    monkeypatch.setattr("shutil.copyfile", lambda a, b: copies.append(a) or real(a, b))
    path, cache, results = rgb_npz.path("train"), tmp_path / "node", []
    threads = [threading.Thread(target=lambda: results.append(copy_to_node(path, cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert sorted(copies) == [path, sidecar_path(path)]
    assert results[0].read_bytes() == path.read_bytes()


def test_a_copy_that_fails_is_one_line_and_leaves_nothing(rgb_npz, tmp_path, monkeypatch):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(DataError, match=r"data\.node_cache='.*': .*train\.npz cannot be copied .*No space left"):
            copy_to_node(rgb_npz.path("train"), tmp_path / "node")
    assert {path.name for path in (tmp_path / "node").rglob("*") if path.is_file()} == {".lock"}
    assert copy_to_node(rgb_npz.path("train"), tmp_path / "node").read_bytes() == rgb_npz.path("train").read_bytes()


def test_a_node_cache_that_cannot_be_made_is_named(rgb_npz, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"data\.node_cache='.*below': .* cannot be copied there"):
        copy_to_node(rgb_npz.path("train"), tmp_path / "file" / "below")


def test_a_copy_may_be_read_by_whoever_may_read_new_files(rgb_npz, tmp_path):
    (tmp_path / "new").touch()
    assert copy_to_node(rgb_npz.path("train"), tmp_path).stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_damaged_copy_is_made_again(rgb_npz, tmp_path):
    copy = copy_to_node(rgb_npz.path("train"), tmp_path)
    copy.write_bytes(b"")
    assert copy_to_node(rgb_npz.path("train"), tmp_path).read_bytes() == rgb_npz.path("train").read_bytes()


def test_open_split_reads_from_the_node_cache(rgb_npz, tmp_path):
    shutil.copytree(rgb_npz.directory, tmp_path / "shared")
    record = tmp_path / "shared" / "prepared.json"
    record.write_text(record.read_text().replace('"node_cache": null', f'"node_cache": "{tmp_path / "node"}"'))
    prepared = PreparedData.load(tmp_path / "shared")
    assert torch.equal(train_images(prepared), train_images(rgb_npz))
    assert len(list((tmp_path / "node").glob("*/train.npz"))) == 1
