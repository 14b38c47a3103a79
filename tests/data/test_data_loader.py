"""The loader's contract: the same for every reader, and none of FFCV's traps."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from pipeline.config.data import AugmentConfig, ColorJitterConfig, RandomResizedCropConfig
from pipeline.data import DataError, PreparedData, open_split
from pipeline.data.folder import folder_source
from pipeline.data.loader import Loader
from pipeline.data.order import Order
from pipeline.data.readers import open_reader
from pipeline.data.samples import shrink, to_channels

ALL = AugmentConfig(cutout=3, color_jitter=ColorJitterConfig(brightness=0.3, hue=0.1))
CROPPED = AugmentConfig(random_resized_crop=RandomResizedCropConfig(), cutout=3)


@pytest.fixture(params=["ffcv", "memory", "npz"])
def opened(request, rgb_npz):
    """Opens a split with each kind of reader."""
    prepared = rgb_npz if request.param == "npz" else request.getfixturevalue("rgb")
    loader = "auto" if request.param == "npz" else request.param
    loaders = []

    def open_it(split="train", **arguments):
        loaders.append(open_split(prepared, split, **{"batch_size": 7, "loader": loader, **arguments}))
        return loaders[-1]

    yield open_it
    for each in loaders:
        each.close()


def drawn(loader):
    batches = list(loader)
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_are_the_images_in_order(opened, rgb_config):
    with np.load(rgb_config.path) as source:
        images, labels = source["test_images"], source["test_labels"]
    loader = opened("test")
    x, y = drawn(loader)
    assert torch.equal(x, torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    assert torch.equal(y, torch.from_numpy(labels))
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
    assert len(loader) == 3


@pytest.mark.parametrize("augment", [None, ALL, CROPPED], ids=["plain", "shifted", "cropped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_reader_gives_the_same_pixels(rgb, rgb_npz, augment, rank):
    arguments = {"batch_size": 4, "seed": 3, "shuffle": True, "augment": augment, "rank": rank, "world_size": 2}
    results = []
    for prepared, kind, workers in ((rgb, "ffcv", 1), (rgb, "ffcv", 5), (rgb, "memory", 1), (rgb_npz, "auto", 1)):
        with open_split(prepared, "train", loader=kind, workers=workers, **arguments) as loader:
            loader.set_epoch(2)
            results.append(drawn(loader))
    assert all(same(results[0], other) for other in results[1:])


def test_epochs_and_seeds_differ_and_repeat(opened):
    loader = opened(shuffle=True, augment=ALL)
    loader.set_epoch(1)
    first, again = drawn(loader), drawn(loader)
    loader.set_epoch(2)
    assert same(first, again)
    assert not same(first, drawn(loader))
    other = opened(shuffle=True, augment=ALL, seed=1)
    other.set_epoch(1)
    assert not same(first, drawn(other))


@pytest.mark.parametrize("start", [0, 1, 4, 7])
def test_resuming_at_any_batch_gives_the_rest_of_the_epoch(opened, start):
    arguments = {"shuffle": True, "augment": ALL}
    whole = opened(**arguments)
    whole.set_epoch(3)
    rest = list(whole)[start:]
    resumed = opened(**arguments)
    resumed.set_epoch(3, start_batch=start)
    got = list(resumed)
    assert len(got) == len(rest) == len(whole) - start
    assert all(same(a, b) for a, b in zip(got, rest, strict=True))
    assert len(list(resumed)) == len(whole)


def test_choosing_the_next_epoch_leaves_the_running_one_alone(opened):
    loader = opened(shuffle=True, augment=ALL)
    loader.set_epoch(3)
    undisturbed = drawn(loader)
    batches = iter(loader)
    first = next(batches)
    loader.set_epoch(9)
    assert same(undisturbed, [torch.cat(parts) for parts in zip(first, drawn(batches), strict=True)])
    assert not same(undisturbed, drawn(loader))


def test_start_batch_beyond_the_epoch_is_refused(opened):
    with pytest.raises(ValueError, match="start_batch expected from 0 to 7, got 8"):
        opened().set_epoch(0, start_batch=8)


def test_shards_hold_every_sample_once(opened):
    labels = drawn(opened())[1]
    shards = [drawn(opened(rank=rank, world_size=3, batch_size=4)) for rank in range(3)]
    assert sum(len(y) for _, y in shards) == len(labels)
    assert sorted(torch.cat([y for _, y in shards]).tolist()) == sorted(labels.tolist())


def test_batches_kept_for_later_are_not_overwritten(opened):
    loader = opened(batch_size=2)
    kept = list(loader)
    copies = [(x.clone(), y.clone()) for x, y in loader]
    assert len(kept) > 10
    assert all(same(a, b) for a, b in zip(kept, copies, strict=True))


def test_a_batch_belongs_to_the_caller(opened):
    loader = opened()
    before = drawn(loader)
    for x, y in loader:
        x.zero_()
        y.zero_()
    assert same(before, drawn(loader))


def abandon(loader, times):
    for epoch in range(times):
        loader.set_epoch(epoch)
        for _ in loader:
            break


def test_abandoned_epochs_leave_no_threads(opened):
    loader = opened(batch_size=2, shuffle=True, augment=ALL)
    abandon(loader, 5)
    threads = threading.active_count()
    abandon(loader, 50)
    assert threading.active_count() <= threads


class LargeReader:
    """Streams batches that a leak of one an epoch would be seen by: a megabyte for five images."""

    storage, size, channels, num_samples = "raw", 256, 3, 40
    labels = np.zeros(40, np.int64)
    shapes = np.full((40, 2), 256)

    def read(self, indices, boxes=None):
        return np.ones((len(indices), 256, 256, 3), np.uint8)

    def close(self):
        pass


def large_photos(photos):
    sidecar = photos.sidecar("train").model_copy(update={"image_size": 256})
    return open_reader(photos.path("train"), sidecar)


@pytest.mark.parametrize("kind", ["streamed", "photos"])
def test_abandoned_epochs_leave_no_memory(kind, request):
    reader = LargeReader() if kind == "streamed" else large_photos(request.getfixturevalue("photos"))
    order = Order(reader.num_samples, 5, shuffle=True)
    with Loader(reader, order, augment=ALL, device=torch.device("cpu"), workers=3) as loader:
        abandon(loader, 20)
        memory = psutil.Process().memory_info().rss
        abandon(loader, 100)
        # One batch of bytes kept per epoch would be 98 MB, one of float32 four times as much; the allocator's own ups
        # and downs were up to 31 MB in a process that had run a thousand other tests.
        assert psutil.Process().memory_info().rss - memory < 60e6


def test_closing_ends_the_threads_and_iteration(opened):
    before = threading.active_count()
    loader = opened(workers=3)
    list(loader)
    loader.close()
    loader.close()
    assert threading.active_count() <= before
    with pytest.raises(RuntimeError, match="loader is closed"):
        iter(loader)


@pytest.mark.parametrize("num_left", [1, 20])
def test_an_iteration_that_outlives_its_loader_says_so(opened, num_left):
    loader = opened(batch_size=2, workers=2)
    batches = iter(loader)
    for _ in range(len(loader) - num_left):
        next(batches)
    loader.close()
    with pytest.raises(RuntimeError, match="loader is closed"):
        next(batches)


def test_more_workers_than_cores_are_fine(rgb):
    with open_split(rgb, "train", batch_size=2, workers=64) as loader:
        assert sum(len(y) for _, y in loader) == rgb.splits["train"].count


@pytest.mark.parametrize("kind", ["rgb", "photos"])
def test_two_loaders_at_once_do_not_disturb_each_other(request, kind):
    prepared = request.getfixturevalue(kind)
    arguments = {"batch_size": 3, "shuffle": True, "augment": ALL, "loader": "ffcv", "workers": 2}
    with open_split(prepared, "train", **arguments) as loader:
        alone = drawn(loader)
    with open_split(prepared, "train", **arguments) as one, open_split(prepared, "train", **arguments) as two:
        pairs = list(zip(one, two, strict=True))
    for number in range(2):
        assert same(alone, [torch.cat(parts) for parts in zip(*(pair[number] for pair in pairs), strict=True)])


def test_global_random_state_and_threads_are_left_alone(opened):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    numpy_state = np.random.get_state()[1].copy()
    list(opened(shuffle=True, augment=ALL, workers=2))
    assert torch.equal(state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert torch.get_num_threads() == threads


def test_workers_augment_on_one_core_each_and_leave_other_threads_alone(opened, monkeypatch):
    """Torch's threads wait for each other after every operation: on taken cores that costs a hundred times the work."""
    from pipeline.data import loader as module

    seen, real = set(), module.augment
    monkeypatch.setattr(module, "augment", lambda *a, **k: seen.add(torch.get_num_threads()) or real(*a, **k))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(opened(augment=ALL, workers=2))
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == {1}


class BrokenReader:
    """Fails at one image."""

    storage, size, channels, num_samples = "raw", 4, 3, 20
    labels = np.zeros(20, np.int64)
    shapes = np.full((20, 2), 4)

    def read(self, indices, boxes=None):
        if 11 in indices:
            raise DataError("image 11 does not decode")
        return np.zeros((len(indices), 4, 4, 3), np.uint8)

    def close(self):
        pass


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_while_decoding_reaches_the_caller_at_its_batch(workers):
    loader = Loader(BrokenReader(), Order(20, 2), augment=None, device=torch.device("cpu"), workers=workers)
    start, batches = time.monotonic(), iter(loader)
    assert len([next(batches) for _ in range(5)]) == 5
    with pytest.raises(DataError, match="image 11 does not decode"):
        next(batches)
    assert time.monotonic() - start < 2
    loader.close()


def test_an_error_in_augmentation_reaches_the_caller(opened, monkeypatch):
    def fail(*_, **__):
        raise ArithmeticError("broken augmentation")

    monkeypatch.setattr("pipeline.data.loader.augment", fail)
    loader = opened(augment=ALL)
    start = time.monotonic()
    with pytest.raises(ArithmeticError, match="broken augmentation"):
        next(iter(loader))
    assert time.monotonic() - start < 2


def test_unknown_split_names_the_known(rgb_npz):
    with pytest.raises(ValueError, match="unknown split 'dev'; known: test, train, val"):
        open_split(rgb_npz, "dev", batch_size=2)


def test_ffcv_loader_cannot_read_npz(rgb_npz):
    with pytest.raises(DataError, match=r"loader=ffcv needs a \.beton"):
        open_split(rgb_npz, "train", batch_size=2, loader="ffcv")


@pytest.fixture
def decoded(photos, photos_config):
    """The reader of the photographs, and what PIL makes of each at its stored size."""
    reader, sidecar = open_reader(photos.path("train"), photos.sidecar("train")), photos.sidecar("train")
    files = folder_source(photos_config).splits["train"].images
    yield reader, [shrink(to_channels(files[index], 3), 100) for index in sidecar.indices]
    reader.close()


def levels_apart(pixels, expected):
    """Mean difference in levels of 255 from a part of a picture, brought to the same size by averaging."""
    small = Image.fromarray(expected).resize((48, 48), Image.Resampling.BOX)
    return np.abs(pixels.astype(int) - np.asarray(small)).mean()


def test_whole_jpeg_images_are_those_that_pil_decodes(decoded):
    reader, pictures = decoded
    assert reader.shapes.tolist() == [list(picture.shape[:2]) for picture in pictures]
    for number, picture in enumerate(pictures):
        box = np.array([[0, 0, *picture.shape[:2]]])
        (pixels,) = reader.read(np.array([number]), box)
        assert pixels.shape == (48, 48, 3)
        # Compression and the decoders' rounding; red and blue exchanged are tens of levels apart.
        difference = levels_apart(pixels, picture)
        assert difference < 4
        assert difference < levels_apart(pixels, picture[:, :, ::-1]) / 4


def test_a_box_is_that_part_of_the_jpeg_image(decoded):
    reader, pictures = decoded
    top, left, height, width = box = (7, 20, 60, 50)
    for number, picture in enumerate(pictures):
        (pixels,) = reader.read(np.array([number]), np.array([box]))
        difference = levels_apart(pixels, picture[top : top + height, left : left + width])
        assert difference < 4
        assert difference < levels_apart(pixels, picture[left : left + width, top : top + height]) / 4


@pytest.mark.parametrize("kind", ["rgb", "photos"])
def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_no_signal(request, kind, tmp_path):
    shutil.copytree(request.getfixturevalue(kind).directory, tmp_path, dirs_exist_ok=True)
    prepared = PreparedData.load(tmp_path)
    with open_split(prepared, "train", batch_size=1, loader="ffcv") as loader:
        batches = iter(loader)
        next(batches)
        os.truncate(prepared.path("train"), 1000)
        with pytest.raises(DataError, match=r"train\.beton: was cut while it was read"):
            list(batches)


@pytest.mark.parametrize("kind", ["rgb", "photos"])
def test_a_disk_that_does_not_answer_is_told_from_a_file_that_was_cut(request, kind, tmp_path):
    prepared = request.getfixturevalue(kind)
    with open_split(prepared, "train", batch_size=1, loader="ffcv") as loader:
        batches = iter(loader)
        next(batches)
        unreadable = os.open(tmp_path / "other", os.O_WRONLY | os.O_CREAT)
        os.dup2(unreadable, loader._reader._file)
        os.close(unreadable)
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            list(batches)
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize(("ranks", "ranks_here", "threads"), [(1, None, 8), (4, None, 2), (8, "2", 4), (8, "8", 1)])
def test_jpeg_decoders_share_the_cores_of_their_own_node(photos, monkeypatch, ranks, ranks_here, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks_here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_here)
    with open_split(photos, "train", batch_size=1, world_size=ranks) as loader:
        assert loader._pool._max_workers == threads


@pytest.mark.parametrize("augment", [None, ALL, CROPPED], ids=["plain", "shifted", "cropped"])
def test_jpeg_decoding_repeats_whatever_the_number_of_workers(photos, augment):
    results = []
    for workers in (1, 4):
        arguments = {"seed": 1, "shuffle": True, "augment": augment, "workers": workers}
        with open_split(photos, "train", batch_size=3, **arguments) as loader:
            loader.set_epoch(1)
            results.append(drawn(loader))
    assert same(*results)


def test_jpeg_split_refuses_to_be_held_in_memory(photos):
    with pytest.raises(DataError, match="loader=memory needs storage=raw"):
        open_split(photos, "train", batch_size=2, loader="memory")
