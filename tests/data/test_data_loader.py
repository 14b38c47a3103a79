"""The loader's contract: the same for every reader, and none of FFCV's traps."""

import threading
import time

import numpy as np
import psutil
import pytest
import torch

from pipeline.config.data import AugmentConfig, ColorJitterConfig, RandomResizedCropConfig
from pipeline.data import DataError, open_split
from pipeline.data.loader import Loader
from pipeline.data.order import Order

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
    assert (len(loader), loader.num_samples) == (3, 20)


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


def test_abandoned_epochs_leave_no_threads_and_no_memory(opened):
    loader = opened(batch_size=2, shuffle=True, augment=ALL)

    def abandon(times):
        for epoch in range(times):
            loader.set_epoch(epoch)
            for _ in loader:
                break

    abandon(5)
    threads, memory = threading.active_count(), psutil.Process().memory_info().rss
    abandon(50)
    assert threading.active_count() <= threads
    assert psutil.Process().memory_info().rss - memory < 20e6


def test_closing_ends_the_threads_and_iteration(opened):
    before = threading.active_count()
    loader = opened(workers=3)
    list(loader)
    loader.close()
    loader.close()
    assert threading.active_count() <= before
    with pytest.raises(RuntimeError, match="loader is closed"):
        iter(loader)


def test_more_workers_than_cores_are_fine(rgb):
    with open_split(rgb, "train", batch_size=2, workers=64) as loader:
        assert sum(len(y) for _, y in loader) == loader.num_samples


def test_two_loaders_at_once_do_not_disturb_each_other(rgb):
    arguments = {"batch_size": 3, "shuffle": True, "augment": ALL, "loader": "ffcv", "workers": 2}
    with open_split(rgb, "train", **arguments) as loader:
        alone = drawn(loader)
    with open_split(rgb, "train", **arguments) as one, open_split(rgb, "train", **arguments) as two:
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


class BrokenReader:
    """Fails at one image."""

    storage, size, channels, num_samples, streams = "raw", 4, 3, 20, True
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
    with pytest.raises(ArithmeticError, match="broken augmentation"):
        next(iter(opened(augment=ALL)))


def test_unknown_split_names_the_known(rgb_npz):
    with pytest.raises(ValueError, match="unknown split 'dev'; known: test, train, val"):
        open_split(rgb_npz, "dev", batch_size=2)


def test_ffcv_loader_cannot_read_npz(rgb_npz):
    with pytest.raises(DataError, match=r"loader=ffcv needs a \.beton"):
        open_split(rgb_npz, "train", batch_size=2, loader="ffcv")


def test_jpeg_images_come_at_one_size_and_look_like_the_source(photos):
    with open_split(photos, "test", batch_size=2) as loader:
        x, _ = drawn(loader)
    assert x.shape[1:] == (3, 48, 48)
    # Natural pictures keep their colours through compression: the mean over the set moves by less than 5 levels.
    assert np.allclose(x.mean((0, 2, 3)), photos.mean, atol=0.15)


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
