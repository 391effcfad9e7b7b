"""A file of prompts on a Ray cluster: workers with a warm generator each make the batches, this
process alone writes.

A batch whose worker is lost goes to another one; what a worker returns is written once. The bundle
must be at the same path on every machine, and this package installed there.
"""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from ssd_export.errors import UserError, first_line
from ssd_export.prompt_files.results import Results
from ssd_export.prompt_files.run import Check, Ledger, Summary
from ssd_export.prompt_files.tasks import ImageTask
from ssd_export.prompt_files.worker import Outcome, WorkerSpec, make_images
from ssd_export.runtime.generate import ImageGenerator, Progress

log = logging.getLogger(__name__)
SECONDS_TO_CONNECT = 10.0
MAX_LOSSES = 3  # of workers with the same batch, then its halves are tried


@dataclass(frozen=True)
class ClusterSpec:
    """The cluster. address: None is RAY_ADDRESS, or else a cluster on this machine alone that ends
    with this process; workers: None is what its CPUs or GPUs allow.
    """

    address: str | None
    workers: int | None


class ImageWorker:
    """A Ray actor: a generator that is opened once."""

    def __init__(self, spec: WorkerSpec) -> None:
        """Opens nothing yet, so that a bundle that cannot be opened has its own error."""
        self._spec = spec
        self._generator: ImageGenerator | None = None

    def open(self) -> str:
        """The hash of the bundle. Raises: UserError for what cannot be opened."""
        self._generator = self._spec.open_generator()
        return self._generator.bundle.hash

    def make(self, tasks: Sequence[ImageTask]) -> list[Outcome]:
        """The images of a batch, or why there is none."""
        assert self._generator is not None
        outcomes: list[Outcome] = []
        size = min(self._spec.batch, self._generator.runner.max_images)
        for start in range(0, len(tasks), size):
            make_images(
                self._generator,
                tasks[start : start + size],
                outcomes.append,
                self._spec.lookahead,
            )
        return outcomes


@dataclass(frozen=True)
class _Batch:
    """Images that are made together. losses: workers that were lost with it."""

    tasks: tuple[ImageTask, ...]
    losses: int = 0

    def again(self) -> list[_Batch]:
        """Batches to try after another loss: the same, its halves, or nothing any more."""
        if self.losses + 1 < MAX_LOSSES:
            return [_Batch(self.tasks, self.losses + 1)]
        half = -(-len(self.tasks) // 2)
        parts = (self.tasks[:half], self.tasks[half:]) if len(self.tasks) > 1 else ()
        return [_Batch(part) for part in parts if part]


@contextmanager
def cluster(spec: ClusterSpec) -> Iterator[None]:
    """A connection to the cluster. Raises: UserError where there is none at the address."""
    if spec.address:
        _check_reachable(spec.address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is reported unless asked for
    try:
        ray.init(
            spec.address,
            logging_level=logging.WARNING,
            log_to_driver=False,
            include_dashboard=None if spec.address else False,
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
        raise _no_cluster(spec.address or "RAY_ADDRESS", error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raises UserError for an address where nothing listens: Ray would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # a name that Ray knows, such as auto
    try:
        socket.create_connection((host, int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster at {address} ({first_line(error)}); start one with"
        " `ray start --head`, or leave the address out"
    )


def run_on_ray(
    spec: ClusterSpec,
    worker: WorkerSpec,
    tasks: Sequence[ImageTask],
    results: Results,
    check: Check,
    progress: Progress,
) -> Summary:
    """Makes the images that are left on the cluster that this process is connected to.

    Args: check: raises UserError for an image that cannot be asked for.
    Raises: UserError where results cannot be written, no worker can be opened, or nothing works any
    more.
    """
    ledger = Ledger(results, progress)
    pending = ledger.pending(tasks, check)
    starts = range(0, len(pending), worker.batch)
    batches = deque(_Batch(tuple(pending[start : start + worker.batch])) for start in starts)
    pool = _Pool(worker, results.bundle_hash, min(spec.workers or _room(worker), len(batches)))
    while batches or pool.is_busy:
        while batches and pool.has_room:
            pool.begin(batches.popleft())
        batch, outcomes = pool.wait()
        if outcomes is None:
            again = batch.again()
            batches.extendleft(reversed(again))
            outcomes = [] if again else [Outcome(task, error=LOST) for task in batch.tasks]
        for outcome in outcomes:
            ledger(outcome)
    return ledger.summary


LOST = f"{MAX_LOSSES} workers were lost while they made it, most likely for want of memory"


def _room(worker: WorkerSpec) -> int:
    """Workers that the cluster has room for. Raises: UserError for none."""
    kind, each = ("GPU", 1) if worker.provider == "cuda" else ("CPU", worker.threads or 1)
    room = int(ray.cluster_resources().get(kind, 0) // each)
    if room < 1:
        fix = "--provider cpu" if kind == "GPU" else "fewer --threads"
        raise UserError(f"the Ray cluster has no room for a worker of {each} {kind}; use {fix}")
    return room


class _Pool:
    """Workers, each busy with one batch at most."""

    def __init__(self, spec: WorkerSpec, bundle_hash: str, size: int) -> None:
        self._spec, self._bundle_hash, self._size = spec, bundle_hash, size
        self._actor = ray.remote(
            num_cpus=spec.threads or 1,
            num_gpus=1 if spec.provider == "cuda" else 0,
            max_restarts=0,
            max_task_retries=0,
        )(ImageWorker)
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, _Batch, Any]] = {}

    @property
    def is_busy(self) -> bool:
        return bool(self._busy)

    @property
    def has_room(self) -> bool:
        return len(self._busy) < self._size

    def begin(self, batch: _Batch) -> None:
        """Gives the batch to an idle worker or a new one."""
        opening = None
        actor: Any = self._idle.pop() if self._idle else None
        if actor is None:
            actor = self._actor.remote(self._spec)
            opening = actor.open.remote()
        self._busy[actor.make.remote(batch.tasks)] = actor, batch, opening

    def wait(self) -> tuple[_Batch, list[Outcome] | None]:
        """The next batch that ends; no outcomes where its worker was lost.

        Raises: UserError where a worker cannot open the bundle, or has another one.
        """
        (ref,), _ = ray.wait(list(self._busy), num_returns=1)
        actor, batch, opening = self._busy.pop(ref)
        try:
            if opening is not None:
                self._check(ray.get(opening))
            outcomes = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            log.exception("a worker failed with a batch of %d images", len(batch.tasks))
            ray.kill(actor)
            return batch, None
        except RayActorError as error:
            log.warning("a worker was lost with %d images: %s", len(batch.tasks), error)
            return batch, None
        self._idle.append(actor)
        return batch, outcomes

    def _check(self, bundle_hash: str) -> None:
        if bundle_hash != self._bundle_hash:
            raise UserError(
                f"a worker's bundle at {self._spec.bundle} is another one than here; copy this one"
                " to every machine"
            )
