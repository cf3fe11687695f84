"""Batches by step number: what feeds a network, from threads that read and, on a GPU, from a queue of its own beside the network's.

On a CPU a thread makes the whole sample. On a GPU a thread reads the crop into pinned memory and queues the rest there: the copy,
the warp and the grey values run on a second stream while the network computes on the first.

A sample is the same on every device up to rounding: also its noise is drawn by the CPU's generator. On one device it is the same
bit for bit, however many threads there are and whatever is made ahead.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Self

import torch
from torch import Tensor

from microtome.config import Plan
from microtome.machine import release_memory
from microtome.threads import usable_cores
from microtome.training.device_warp import warp_on_device
from microtome.training.sampling import Pool, change_values, draw_sample, load_sample, read_crop
from microtome.training.store import StoredCase
from microtome.training.transfer import Lane, sent
from microtome.training.warp import Patch

# Steps whose samples are made while a GPU computes: one on its way, and one more for a read that takes long.
AHEAD = 2


class Batch(NamedTuple):
    """The patches of a step.

    Attributes:
        image: (B, C, *patch) float32, channels last.
        label: (B, *patch) int16, -1 where not annotated.
        weight: (B, *patch) float32, how much each voxel counts in the loss; None: all alike.
    """

    image: Tensor
    label: Tensor
    weight: Tensor | None


class Batches:
    """Batches by step number, their samples made by a pool of threads.

    On a GPU the next steps' samples are made while it computes. On a CPU a step's samples are made when it begins: the
    cores are busy with the network otherwise, and a thread beside it would only take its share of them.

    Args:
        cases: to draw from.
        plan: what is drawn, and how many.
        device: where the batches are wanted.
        border: voxels on each side of a patch that the network does not answer for.
        on_device: whether samples are warped and changed there; None: on a GPU.
        positions: the places in the batch that are wanted here; None: all.

    Attributes:
        ahead: steps whose samples are made before they are asked for.
    """

    def __init__(
        self,
        cases: Sequence[StoredCase],
        plan: Plan,
        device: torch.device,
        border: int = 0,
        *,
        on_device: bool | None = None,
        positions: range | None = None,
    ) -> None:
        self.drawn_from, self.plan, self.device, self.border = Pool.of(cases), plan, device, border
        self.ahead = 0 if device.type == "cpu" else AHEAD
        self.on_device = device.type == "cuda" if on_device is None else on_device
        self.positions = range(plan.batch) if positions is None else positions
        self.lane = Lane(device)
        self.waiting: dict[int, list[Future[tuple[Patch, torch.cuda.Event | None]]]] = {}
        self.pool = _started_pool(max(2, min(usable_cores(), len(self.positions) * (self.ahead + 1))))

    def get(self, step: int) -> Batch:
        """The batch of a step, on the device.

        Raises:
            Exception: whatever went wrong in a thread that made one of its samples.
        """
        for number in range(step, step + self.ahead + 1):
            if number not in self.waiting:
                self.waiting[number] = [self.pool.submit(self._make, number, position) for position in self.positions]
        patches = [self._received(future) for future in self.waiting[step]]
        # Not before: where one failed, `get_again` must know of the others, which may not have ended.
        del self.waiting[step]
        return self._together(patches)

    def get_again(self, step: int) -> Batch:
        """The same batch, made anew, one sample after the other, with nothing made ahead: memory was too short for all at once.

        Raises:
            Exception: as of `get`.
        """
        self._give_up()
        release_memory()
        return self._together([self._received(self.pool.submit(self._make, step, position)) for position in self.positions])

    def move(self, positions: range) -> None:
        """Other places in the batch are wanted from now on."""
        if positions != self.positions:
            self._give_up()
            self.positions = positions

    def _give_up(self) -> None:
        """Leave what is under way unmade, and wait for what cannot be: it would go on to take memory."""
        given_up = [future for futures in self.waiting.values() for future in futures]
        self.waiting = {}
        wait([future for future in given_up if not future.cancel()])

    def _together(self, patches: Sequence[Patch]) -> Batch:
        """Finished samples as a batch on the device."""
        layout = torch.channels_last if self.plan.dims == 2 else torch.channels_last_3d
        image = torch.stack([patch.image for patch in patches]).to(self.device, memory_format=layout)
        label = torch.stack([patch.label for patch in patches]).to(self.device)
        weights = [patch.weight for patch in patches if patch.weight is not None]
        return Batch(image, label, torch.stack(weights).to(self.device) if weights else None)

    def _make(self, step: int, position: int) -> tuple[Patch, torch.cuda.Event | None]:
        """One sample of one step, and when it is finished; runs in a thread."""
        sample = draw_sample(self.drawn_from, self.plan, step, position, self.border)
        cases, patch_vox = self.drawn_from.cases, self.plan.patch_vox
        if not self.on_device:
            return load_sample(sample, cases, patch_vox), None
        crop = read_crop(sample, cases, patch_vox)
        with self.lane.entered():
            image, label, weight = crop.patch
            part = Patch(sent(image, self.device), sent(label, self.device), None if weight is None else sent(weight, self.device))
            patch = warp_on_device(part, sample.warp, crop.centre, patch_vox)
            patch = patch._replace(image=change_values(sample, patch.image, cases))
            return patch, self.lane.mark()

    def _received(self, future: Future[tuple[Patch, torch.cuda.Event | None]]) -> Patch:
        """A finished sample, or one that the device's queue of the caller waits for."""
        patch, done = future.result()
        self.lane.receive(done, *patch)
        return patch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)


def _started_pool(count: int) -> ThreadPoolExecutor:
    """A pool whose threads all run already, each with one thread of torch's.

    A sample's operations are too small to be shared out: two threads would mostly wait for each other. The call by which a
    thread says so also limits the library behind large products, for all threads: that is given back when the last has made it.
    """
    threads, all_here = torch.get_num_threads(), threading.Barrier(count)
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    list(pool.map(lambda _: all_here.wait(timeout=60), range(count)))
    torch.set_num_threads(threads)
    return pool
