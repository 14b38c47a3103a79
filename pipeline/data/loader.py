"""The loader: one class for every reader, so that order, shards, augmentation and errors cannot differ between them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeline.config.data import AugmentConfig
from pipeline.data.augment import augment, center_boxes, random_boxes, to_float
from pipeline.data.order import Indices, Order
from pipeline.data.readers import Reader


class Loader:
    """Batches (x float32 (B, C, S, S) in [0, 1], y int64 (B,)) of one rank, on one device.

    What comes is a function of (seed, epoch, rank, world size): not of the reader, the number of workers, or what was
    drawn before. An error in a worker is raised by the next step of the iteration; an epoch may be left at any time.
    """

    def __init__(
        self, reader: Reader, order: Order, *, augment: AugmentConfig | None, device: torch.device, workers: int
    ) -> None:
        self._reader, self._order, self._augment, self._device = reader, order, augment, device
        self._labels = torch.from_numpy(reader.labels)
        self._epoch, self._start, self._closed = 0, 0, False
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="loader") if reader.streams else None
        self._ahead = workers + 1

    def __len__(self) -> int:
        """Batches per epoch: equal on every rank."""
        return len(self._order)

    @property
    def num_samples(self) -> int:
        """Samples that this rank sees per epoch."""
        return self._order.samples_per_epoch

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to draw, and the batch at which its next iteration begins (for resuming)."""
        if not 0 <= start_batch <= len(self):
            raise ValueError(f"start_batch expected from 0 to {len(self)}, got {start_batch}")
        self._epoch, self._start = epoch, start_batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._closed:
            raise RuntimeError("this loader is closed; open the split again")
        start, self._start = self._start, 0
        batches = self._order.batches(self._epoch)
        jobs = (self._job(self._epoch, number, batches[number]) for number in range(start, len(batches)))
        return (self._finish(job, images) for job, images in self._read_ahead(jobs))

    def _job(self, epoch: int, number: int, indices: Indices) -> "_Job":
        job = _Job(indices, self._order.generator(epoch, number), None)
        if self._reader.storage == "raw":
            return job
        shapes = self._reader.shapes[indices]
        crop = self._augment.random_resized_crop if self._augment is not None else None
        if crop is None:
            return replace(job, boxes=center_boxes(shapes))
        return replace(job, boxes=random_boxes(torch.from_numpy(shapes), crop, job.generator).numpy())

    def _read_ahead(self, jobs: Iterator["_Job"]) -> Iterator[tuple["_Job", Tensor]]:
        if self._pool is None:
            yield from ((job, self._load(job)) for job in jobs)
            return
        waiting: deque[tuple[_Job, Future[Tensor]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, self._pool.submit(self._load, job)))
                if len(waiting) > self._ahead:
                    first, loaded = waiting.popleft()
                    yield first, loaded.result()
            while waiting:
                first, loaded = waiting.popleft()
                yield first, loaded.result()
        finally:
            for _, future in waiting:
                future.cancel()

    def _load(self, job: "_Job") -> Tensor:
        images = torch.from_numpy(self._reader.read(job.indices, job.boxes))
        return images.pin_memory() if self._device.type == "cuda" else images

    def _finish(self, job: "_Job", images: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self._device, non_blocking=True)
        y = self._labels[torch.from_numpy(job.indices)].to(self._device, non_blocking=True)
        if self._augment is None:
            return to_float(images), y
        return augment(images, self._augment, job.generator, cropped=job.boxes is not None), y

    def close(self) -> None:
        """Stop the workers and let go of the file. Closing twice is fine."""
        if self._closed:
            return
        self._closed = True
        if self._pool is not None:
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
