"""The writer's process: no hang, no leftovers, no change to the caller."""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_sets import needs_ffcv, picture

import pipeline.data.write as module
from pipeline.config.data import DataConfig
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


def test_a_process_that_does_not_take_its_job_is_given_up_too(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 600\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    large = np.zeros((300, 64, 64, 3), np.uint8)  # more than a pipe takes
    start = time.monotonic()
    with pytest.raises(DataError, match=r"took longer than data\.timeout"):
        write_apart([work(large, tmp_path / "train.beton")], tmp_path, 2)
    assert time.monotonic() - start < 30


def test_a_source_that_cannot_be_handed_over_is_an_error_of_its_own(tmp_path):
    with pytest.raises(TypeError, match="cannot pickle"):
        write_apart([work(threading.Lock(), tmp_path / "train.beton")], tmp_path, 60)


ON_A_TERMINAL = """
import sys
from pathlib import Path
from test_data_writing import Counting, Raising, work
from pipeline.data import DataError, build
from pipeline.data.apart import write_apart
place = Path(sys.argv[1])
build._write([work(Counting(), place / f"good.{sys.argv[2]}")], place, 120)
try:
    build._write([work(Raising(), place / f"bad.{sys.argv[2]}")], place, 120)
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("kind", ["beton", "npz"])
def test_a_terminal_shows_a_bar_and_no_traceback(tmp_path, kind):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", ON_A_TERMINAL, str(tmp_path), kind]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end was closed by all
            break
        shown += piece
        if not piece:
            break
    os.close(ours)
    printed, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert "disk on fire" in printed
    assert "good: 100%" in shown.decode()
    assert "300/300" in shown.decode()
    assert "Traceback" not in shown.decode()


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


def spoil_an_image(reader):
    reader._images = np.array(reader._images)
    reader._images[150] += 1


def spoil_the_labels(reader):
    reader.labels = reader.labels[::-1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_an_image, "image 150 read back is not the one written"),
        (spoil_the_labels, "the labels read back are not those written"),
    ],
)
def test_what_is_not_read_back_as_written_is_refused(tmp_path, monkeypatch, spoil, message):
    """A reader that changes what it reads stands for a disk that lies."""
    real = module.open_reader

    def lying(*arguments, **options):
        reader = real(*arguments, **options)
        spoil(reader)
        return reader

    monkeypatch.setattr(module, "open_reader", lying)
    with pytest.raises(DataError, match=message):
        write_split(work(Counting(), tmp_path / "x.npz"))
    assert not (tmp_path / "x.npz.json").exists()


class Pictures(Raising):
    def __getitem__(self, index):
        return picture(index, 40, 50)


def test_a_jpeg_that_is_not_read_back_as_written_is_refused(tmp_path):
    recipe = RECIPE.model_copy(update={"storage": "jpeg", "image_size": 32, "writers": 1})
    samples = Samples(Pictures(), np.arange(300), np.arange(300) % 2, 3, size=None, max_side=50)
    path = tmp_path / "train.beton"
    write_apart([SplitWork(samples, path, recipe)], tmp_path, 120)
    sidecar, nothing = read_sidecar(path), np.empty(0)
    module._verify(samples, path, nothing, sidecar, recipe.jpeg_quality)
    with pytest.raises(DataError, match="the labels read back are not those written"):
        module._verify(replace(samples, labels=1 - samples.labels), path, nothing, sidecar, recipe.jpeg_quality)
    reader = module.open_reader(path, sidecar)
    place = int(reader._starts[299] + reader._sizes[299] // 2)
    reader.close()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match="image 299 read back is not the one written"):
        module._verify(samples, path, nothing, sidecar, recipe.jpeg_quality)


@pytest.mark.parametrize("side", [1, 8, 224, 512, 835, 4096, 8192, 26_755, 65_500])
@pytest.mark.parametrize("count", [1, 100, 10**6])
def test_the_writers_pages_are_of_a_size_that_ffcv_takes_and_hold_an_image(side, count):
    from ffcv.writer import MAX_PAGE_SIZE, MIN_PAGE_SIZE

    from pipeline.data import beton

    page = beton.page_size(side * side * 3, count)
    assert page.bit_count() == 1
    assert MIN_PAGE_SIZE <= page < MAX_PAGE_SIZE
    assert page >= min(side * side * 3, 1 << 31)
    assert page < 2 * max(side * side * 3, 1 << 22) or page == 1 << 23


def test_the_file_of_a_small_split_is_small(rgb):
    assert rgb.path("train").stat().st_size < 5 << 20


def test_the_longest_side_that_the_configuration_takes_fits_into_a_page():
    from pipeline.data import beton

    side = next(m.le for m in DataConfig.model_fields["max_side"].metadata if hasattr(m, "le"))
    assert beton.page_size(side * side * 3, 1) >= side * side * 3


@pytest.mark.parametrize(("num_samples", "writers"), [(9_999, 1), (10_000, 3)])
def test_as_many_write_as_this_process_has_cores(monkeypatch, num_samples, writers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5})
    assert module._num_writers(num_samples) == writers


class Wide(Raising):
    def __getitem__(self, index):
        return np.full((128, 128, 3), index % 256, np.uint8)


def test_an_npz_is_written_in_constant_memory(tmp_path):
    """150 MB, of which a share of the images is read back from the disk."""
    count, me = 3000, psutil.Process()
    samples = Samples(Wide(), np.arange(count), np.arange(count) % 2, 3, size=128)
    item = SplitWork(samples, tmp_path / "x.npz", RECIPE.model_copy(update={"image_size": 128}))
    write_split(work(Counting(), tmp_path / "first.npz"))
    before, peak, done = _own_memory(me), 0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, _own_memory(me))

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        write_split(item)
    finally:
        done.set()
        sampler.join()
    assert (tmp_path / "x.npz").stat().st_size > 147e6
    assert peak - before < 40e6


def _own_memory(process):
    """Without pages of mapped files, which the kernel takes back when it needs them."""
    return process.memory_info().rss - process.memory_info().shared


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
