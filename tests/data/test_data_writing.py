"""The writer's process: no hang, no leftovers, no change to the caller."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from data_sets import needs_ffcv

from pipeline.data import DataError
from pipeline.data.apart import write_apart
from pipeline.data.samples import Samples
from pipeline.data.sidecar import read_sidecar
from pipeline.data.write import SplitRecipe, SplitWork, write_split

pytestmark = needs_ffcv
RECIPE = SplitRecipe(
    source="made up",
    split="train",
    origin="train",
    storage="raw",
    image_size=4,
    num_classes=2,
    jpeg_quality=90,
    writers=2,
)


class Raising:
    def __len__(self):
        return 300

    def __getitem__(self, index):
        if index == 250:
            raise OSError("disk on fire")
        return np.zeros((4, 4, 3), np.uint8)


class Killing(Raising):
    def __getitem__(self, index):
        if index == 250:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros((4, 4, 3), np.uint8)


class Sleeping(Raising):
    def __getitem__(self, index):
        time.sleep(60)


class Counting(Raising):
    def __getitem__(self, index):
        return np.full((4, 4, 3), index % 256, np.uint8)


def work(images, path):
    return SplitWork(Samples(images, np.arange(300), np.arange(300) % 2, 3, size=4), path, RECIPE)


def shared_memory():
    place = Path("/dev/shm")
    return {p.name for p in place.iterdir() if p.name.startswith("psm_")} if place.exists() else set()


@pytest.mark.parametrize(
    ("images", "timeout", "message"),
    [
        (Raising(), 120, "writing the splits failed: OSError: disk on fire"),
        (Killing(), 120, "a writer process ended with exit code -9"),
        (Sleeping(), 4, "took longer than data.timeout"),
    ],
    ids=["raises", "killed", "too slow"],
)
def test_a_writer_in_trouble_ends_with_an_error_and_leaves_no_process(tmp_path, images, timeout, message):
    before = shared_memory()
    with pytest.raises(DataError, match=message):
        write_apart([work(images, tmp_path / "train.beton")], tmp_path, timeout)
    assert not (tmp_path / "train.beton.json").exists()
    deadline = time.monotonic() + 10
    while (_processes(tmp_path) or shared_memory() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes(tmp_path)
    assert not shared_memory() - before


ORPHAN = """
import sys
from pathlib import Path
from test_data_writing import Sleeping, work
from pipeline.data.apart import write_apart
place = Path(sys.argv[1])
write_apart([work(Sleeping(), place / "train.beton")], place, 600)
"""


def test_a_writer_ends_when_its_parent_is_killed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    place = tmp_path / "orphan"
    place.mkdir()
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN, str(place)], env=environment)
    writer = place / "write.error"
    while not _processes(writer) or not (place / "train.beton").exists():
        assert parent.poll() is None
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while _processes(writer) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _processes(writer)


def _processes(mark):
    """Processes whose command line names the job's folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [place] if str(mark).encode() in place.read_bytes() else []
        except OSError:
            continue
    return found


def test_parallel_writing_keeps_order_and_content_digest(tmp_path):
    """Two writers race for pages, so the files may differ; labels, pixels and their digest may not."""
    parallel, alone = work(Counting(), tmp_path / "parallel.beton"), work(Counting(), tmp_path / "alone.npz")
    write_apart([parallel], tmp_path, 120)
    write_split(alone)
    assert read_sidecar(parallel.path).content == read_sidecar(alone.path).content


def test_what_was_not_written_as_read_is_refused(tmp_path):
    """A source that changes between writing and reading back stands for a disk that lies."""

    class Fickle(Counting):
        calls = 0

    recipe = RECIPE.model_copy(update={"image_size": 4})
    item = SplitWork(Samples(Fickle(), np.arange(300), np.arange(300) % 2, 3, size=4), tmp_path / "x.npz", recipe)
    import pipeline.data.write as module

    real = module.open_reader

    def lying(path, sidecar):
        reader = real(path, sidecar)
        reader._images[150] += 1
        return reader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "open_reader", lying)
        with pytest.raises(DataError, match="image 150 read back is not the one written"):
            write_split(item)
    assert not (tmp_path / "x.npz.json").exists()


def test_kernels_compile_where_no_cache_can_be_written():
    from pipeline.data import beton

    scope = {}
    exec("def double(x): return 2 * x", scope)  # numba finds no file to keep the cache of such a function beside
    assert beton._compiled(scope["double"])(21) == 42


CHECK = """
import sys, threading
import torch
torch.set_num_threads(2)
from pipeline.data import PreparedData, open_split, prepare
assert not {"ffcv", "numba"} & set(sys.modules), "ffcv came with the package"
import numba
numba.set_num_threads(min(2, numba.config.NUMBA_NUM_THREADS))
before = torch.get_num_threads(), numba.get_num_threads()
with open_split(PreparedData.load(sys.argv[1]), "train", batch_size=4, workers=3) as loader:
    list(loader)
assert (torch.get_num_threads(), numba.get_num_threads()) == before, "thread counts changed"
from pipeline.data import beton
print("compiled code from the cache:", sum(beton._gather.stats.cache_hits.values()))
"""


def test_ffcv_is_imported_late_leaves_thread_counts_alone_and_compiles_once_per_machine(rgb):
    from pipeline.data import open_split

    open_split(rgb, "train", batch_size=4).close()
    list(open_split(rgb, "train", batch_size=4))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHECK, str(rgb.directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "compiled code from the cache: 1" in done.stdout
