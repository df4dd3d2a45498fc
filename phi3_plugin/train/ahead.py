"""The batches of a run, made a step ahead while a GPU computes the one before."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from phi3_plugin.data.order import Collate, Order
from phi3_plugin.device import computes_ahead
from phi3_plugin.train.losses import Batch
from phi3_plugin.train.step import awaiting
from phi3_plugin.train.world import World

Made = tuple[list[int], list[Batch]]


class Batches:
    """Hands out what one process sees of each step.

    On a CPU nothing is made ahead: a second thread would take its time from the first.
    """

    def __init__(self, world: World, order: Order, collate: Collate, steps: int) -> None:
        """Make nothing yet.

        Args:
            world: All processes.
            order: Of the samples.
            collate: Makes a batch of samples.
            steps: Of the whole run.
        """
        self._world, self._order, self._collate, self._steps = world, order, collate, steps
        self._next: Future[Made] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if computes_ahead(world.device):
            # Pinned memory belongs to a device, and a new thread would take the first one
            use = torch.accelerator.set_device_index, (world.device.index,)
            self._thread = ThreadPoolExecutor(1, "batches", *use)

    def of(self, step: int) -> Made:
        """Return the samples of a step, by number, and this process's micro-batches of it.

        Args:
            step: Counted from the start of the run; each is asked for once, in their order.
        """
        made = self._next.result() if self._next else self._make(step)
        if self._thread and step + 1 < self._steps:
            self._next = self._thread.submit(self._make, step + 1)
        return made

    def _make(self, step: int) -> Made:
        samples = self._order.indices(step)
        batches = self._order.batches(step, self._world.rank, self._collate)
        return samples, [awaiting(batch, self._world.device) for batch in batches]
