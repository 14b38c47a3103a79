"""The loader: one class for every reader, so that order, shards, augmentation and errors cannot differ between them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from pipeline.config.data import AugmentConfig
from pipeline.data.augment import augment, center_boxes, random_boxes, to_float
from pipeline.data.order import Indices, Order
from pipeline.data.readers import Reader


class Loader:
    """Batches (x float32 (B, C, S, S) in [0, 1], y int64 (B,)) of one rank, on one device.

    What comes is a function of (seed, epoch, rank, world size): not of the reader, the number of workers, or what was
    drawn before. An error in a worker is raised by the next step of the iteration; an epoch may be left at any time.

    Workers are threads. They read and decode and, where the device is the CPU, augment: each on one core, since torch's
    own threads would wait for each other after every operation wherever a core is taken, be it by another worker.
    """

    def __init__(
        self, reader: Reader, order: Order, *, augment: AugmentConfig | None, device: torch.device, workers: int
    ) -> None:
        self._reader, self._order, self._augment, self._device = reader, order, augment, device
        self._labels = torch.from_numpy(reader.labels)
        self._epoch, self._start, self._closed = 0, 0, False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader", initializer=_stay_on_one_core)
        self._ahead = workers + 1

    def __len__(self) -> int:
        """Batches per epoch: equal on every rank."""
        return len(self._order)

    def may_pause(self, batch: int) -> bool:
        """Whether any number of ranks can take up the epoch after `batch` batches; see `Order.may_pause`."""
        return self._order.may_pause(batch)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to draw, and the batch at which its next iteration begins (for resuming)."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch expected from 0 to {len(self)}, got {start_batch}")
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._check_open()
        # Bound now: the next epoch may be chosen while this one is being drawn.
        epoch, start, self._start = self._epoch, self._start, 0
        batches = self._order.batches(epoch)
        jobs = (self._job(epoch, number, batches[number]) for number in range(start, len(batches)))
        return self._read_ahead(jobs)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this loader is closed; open the split again")

    def _job(self, epoch: int, number: int, indices: Indices) -> "_Job":
        self._check_open()
        job = _Job(indices, self._order.generator(epoch, number), None)
        if self._reader.storage == "raw":
            return job
        shapes = self._reader.shapes[indices]
        crop = self._augment.random_resized_crop if self._augment is not None else None
        if crop is None:
            return replace(job, boxes=center_boxes(shapes))
        return replace(job, boxes=random_boxes(torch.from_numpy(shapes), crop, job.generator).numpy())

    def _read_ahead(self, jobs: Iterator["_Job"]) -> Iterator[tuple[Tensor, Tensor]]:
        waiting: deque[tuple[_Job, Future[Tensor]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._pool.submit(self._load, job)))
                if len(waiting) > self._ahead:
                    yield self._delivered(*waiting.popleft())
            while waiting:
                self._check_open()
                yield self._delivered(*waiting.popleft())
        finally:
            for _, future in waiting:
                future.cancel()

    def _load(self, job: "_Job") -> Tensor:
        """By a worker: a batch of images, finished where the device is the CPU."""
        images = torch.from_numpy(self._reader.read(job.indices, job.boxes))
        if self._device.type == "cpu":
            return self._finished(job, images)
        return images.pin_memory() if self._device.type == "cuda" else images

    def _delivered(self, job: "_Job", loaded: "Future[Tensor]") -> tuple[Tensor, Tensor]:
        """By the caller: the batch on the device."""
        images, y = loaded.result(), self._labels[torch.from_numpy(job.indices)]
        if self._device.type == "cpu":
            return images, y
        images = self._finished(job, images.to(self._device, non_blocking=True))
        return images, y.to(self._device, non_blocking=True)

    def _finished(self, job: "_Job", images: Tensor) -> Tensor:
        if self._augment is None:
            return to_float(images)
        return augment(images, self._augment, job.generator, cropped=job.boxes is not None)

    def close(self) -> None:
        """Stop the workers and let go of the file. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class _Job:
    """One batch on its way: where its images are, what part of each is wanted, and its randomness."""

    indices: Indices
    generator: torch.Generator
    boxes: Indices | None


def _stay_on_one_core() -> None:
    """Keep the operations of the calling thread, and of no other, from using torch's other threads."""
    torch.get_num_threads()  # a thread that has not asked for it yet takes torch's number later
    threadpool_limits(1, "openmp")
