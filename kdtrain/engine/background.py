"""Checkpoints written while training continues: the same bytes as those of `checkpoint.save`, by a thread per rank.

A step waits only until this rank's slices have been copied to host memory. The threads never communicate: `busy` is
reduced in the all-reduce that each step makes anyway; when no rank is busy, all enter the next stage (`advance`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.engine.commit import (
    CheckpointPath,
    Description,
    all_ranks_or_raise,
    complete,
    gather_on_main,
    prepare,
    rollback_on_error,
)
from kdtrain.engine.slices import Fragment, writable, write_slices

BLOCK_BYTES = 1 << 28
"""CUDA rounds pinned allocations up to a power of two; with blocks of this size only the last one is rounded."""

Task = Callable[[], Any]
Prune = Callable[[Path], None]
Stages = Generator[tuple[str, Task], Any, None]


class Snapshot:
    """Host memory for what one rank writes: 12 bytes per parameter it owns, allocated once, pinned for CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[torch.Tensor] = []
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Host memory held."""
        return sum(4 * block.numel() for block in self._blocks)

    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy float32 `fragments` one after the other, replacing the former content. Synchronises the device."""
        self._used = sum(fragment.tensor.numel() for fragment in fragments)
        self._grow()
        size, at = BLOCK_BYTES // 4, 0
        for fragment in fragments:
            source, begin = fragment.tensor.detach(), 0
            while begin < source.numel():
                block, offset = self._blocks[at // size], at % size
                count = min(source.numel() - begin, size - offset)
                block[offset : offset + count].copy_(source[begin : begin + count], non_blocking=True)
                begin, at = begin + count, at + count
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def data(self) -> Iterator[memoryview]:
        """The bytes of the copied fragments, in order."""
        left = self._used
        for block in self._blocks:
            if left:
                values: Any = block[: min(left, block.numel())].numpy()
                yield memoryview(values).cast("B")
                left -= len(values)

    def _grow(self) -> None:
        held = sum(block.numel() for block in self._blocks)
        if held >= self._used:
            return
        self._blocks.clear()  # freed before the new ones are allocated
        left, pinned = self._used, self._device.type == "cuda"
        while left:
            count = min(left, BLOCK_BYTES // 4)
            self._blocks.append(torch.empty(count, pin_memory=pinned))
            left -= count


class BackgroundWriter:
    """Writes one checkpoint at a time. Every rank holds one and calls its methods, except `busy`, at the same steps.

    A checkpoint goes through stages: every rank writes its file; rank 0 completes the folder; rank 0 removes old
    checkpoints. A failure of one rank in a stage raises on all ranks at the end of the stage, as in `save`.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh = mesh
        self._snapshot = Snapshot(device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdtrain-checkpoint")
        self._place: CheckpointPath | None = None
        self._stages: Stages | None = None
        self._failure = ""
        self._future: Future[Any] | None = None

    @property
    def in_flight(self) -> Path | None:
        """The checkpoint that is being written; the same on all ranks."""
        return None if self._place is None else self._place.final

    @property
    def busy(self) -> bool:
        """Whether this rank's thread is still working on the current stage. Neither communicates nor waits."""
        return self._future is not None and not self._future.done()

    @property
    def host_bytes(self) -> int:
        """Host memory that this rank keeps for copies."""
        return self._snapshot.num_bytes

    def begin(
        self,
        root: Path,
        about: Description,
        fragments: Sequence[Fragment],
        adam_steps: dict[str, int],
        *,
        prune: Prune = lambda saved: None,
    ) -> Path:
        """Copy `fragments`, begin to write `root`/step_NNNNNN and return that path.

        about, fragments, adam_steps: as for `checkpoint.write_checkpoint`. prune: called on rank 0 with the path once
        it exists, may raise CheckpointError. Communicates: one all-gather of None or a message. Raises CheckpointError
        on all ranks when the folder cannot be made; RuntimeError while another one is in flight.
        """
        if self._place is not None:
            raise RuntimeError(f"{self._place.final} is still being written; wait for it first")
        state = json.loads(json.dumps(about.state))  # a copy: the caller may change it while training continues
        place = CheckpointPath(root, about.step)
        all_ranks_or_raise(self._mesh, place.failure, lambda: prepare(place) if self._mesh.is_main else None)
        kept = writable(place.rank_file(self._mesh.rank), fragments)
        self._snapshot.take(kept)
        self._place = place
        self._stages = self._run_stages(place, replace(about, state=state), kept, adam_steps, prune)
        self._start(next(self._stages))
        return place.final

    def advance(self) -> Path | None:
        """End the current stage and start the next; returns the checkpoint's path after the last stage, else None.

        Every rank must call it; it waits for the slowest unless no rank is `busy`. Does nothing without a checkpoint in
        flight. Communicates: one all-gather of None or a message, after the first stage also one gather of small
        objects. Raises CheckpointError on all ranks; former checkpoints are then as they were.
        """
        if self._place is None or self._stages is None or self._future is None:
            return None
        place, stages = self._place, self._stages
        try:
            with rollback_on_error(self._mesh, place):
                # The next stage needs this stage of every rank, and an error of one ends the save on all.
                result = all_ranks_or_raise(self._mesh, self._failure, self._future.result)
            self._start(stages.send(result))
        except StopIteration:
            self._reset()
            return place.final
        except BaseException:
            self._reset()
            raise
        return None

    def wait(self) -> Path | None:
        """Wait for the checkpoint in flight and return its path, None if there is none. Every rank must call it.

        Raises as `advance`.
        """
        path = self.in_flight
        while self._place is not None:
            self.advance()
        return path

    def _run_stages(
        self,
        place: CheckpointPath,
        about: Description,
        kept: Sequence[Fragment],
        adam_steps: dict[str, int],
        prune: Prune,
    ) -> Stages:
        """Yields (beginning of an error message, this rank's work), stage by stage."""
        mesh, slices = self._mesh, [fragment.as_slice() for fragment in kept]
        path = place.rank_file(mesh.rank)
        entry = yield place.failure, lambda: write_slices(path, slices, self._snapshot.data())
        written = gather_on_main(mesh, (entry, adam_steps))  # rank 0 lists the files of all ranks in the manifest
        yield place.failure, lambda: complete(place, about, written) if mesh.is_main else None
        yield f"{place.root} was not pruned", lambda: prune(place.final) if mesh.is_main else None

    def _start(self, stage: tuple[str, Task]) -> None:
        self._failure, work = stage
        self._future = self._pool.submit(work)

    def _reset(self) -> None:
        self._place, self._stages, self._future = None, None, None
