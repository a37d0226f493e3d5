"""What a long run watches for in its steps: gradients that are not finite, losses that jump, ranks that hold others up.

Only the first ever acts. What is written down goes to skipped.jsonl and spikes.jsonl in the run folder, on rank 0.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema import GuardSection
from kdtrain.distributed.collectives import gather_objects, gather_ranks
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import NonFiniteLoss, OutputError
from kdtrain.log import LOGGER
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training.progress import Progress

WINDOW = 100
"""Losses that a new one is compared with."""
LEAST = 20
"""Fewer losses say nothing of what is usual."""
STRAGGLER = 1.5
"""A rank this many times slower than the median holds the others up."""
NOISE_S = 0.02
"""Seconds per step below which differences between ranks are a scheduler's, not a machine's."""
QUIET_STEPS = 100
"""Steps after a warning of slow data or a slow rank without another of its kind."""


@dataclass(frozen=True, slots=True)
class Events:
    """Files for what was found; on rank 0 only."""

    skipped: JsonlSink
    spikes: JsonlSink


class Guards:
    """The guards of one run. Every rank holds one and calls the same methods at the same steps.

    progress: the run's; its counters are kept up here, so that a resumed run goes on as if it had not stopped.
    """

    def __init__(
        self, settings: GuardSection, mesh: Mesh, device: torch.device, progress: Progress, events: Events | None = None
    ) -> None:
        self._settings, self._mesh, self._device = settings, mesh, device
        self._progress = progress
        self._events = events
        self._unseen: list[tuple[int, Tensor, Tensor]] = []  # step, [loss, valid tokens] of this data rank, sample ids
        self._slow = SlowRanks(settings.data_wait_share, mesh, device, progress)
        self.failure: OutputError | None = None
        """A file of this rank that could not be written."""

    def applied(self, micro_batches: list[Batch], sums: list[tuple[Tensor, Tensor]]) -> None:
        """The step just counted in `progress` was applied; sums: (loss, valid tokens) of its micro-batches.

        Neither communicates nor synchronises.
        """
        self._progress.skipped_in_row = 0
        if self._settings.spike_sigmas is not None:
            pair = torch.stack([torch.stack([loss.detach().double(), count.double()]) for loss, count in sums]).sum(0)
            self._unseen.append((self._progress.step, pair, _ids(micro_batches)))

    def skipped(self, micro_batches: list[Batch], grad_norm: float) -> None:
        """The step just counted in `progress` was not finite on some rank and was applied on none.

        Communicates: one all-gather over dp of the step's sample ids. Raises NonFiniteLoss on all ranks after more
        than guard.max_skipped_steps in a row.
        """
        p, most = self._progress, self._settings.max_skipped_steps
        p.skipped_steps += 1
        p.skipped_in_row += 1
        # The skipped step has samples of all data ranks; rank 0 writes them.
        everyone = gather_ranks(_ids(micro_batches).to(self._device), self._mesh.dp_group).tolist()
        self._write("skipped", {"data/step": p.step, "grad_norm": str(grad_norm), "sample_ids": everyone})
        if p.skipped_in_row <= most:
            _warn(
                self._mesh,
                "skipped  step %d: the gradient norm is %s; weights and optimizer stay (%d in a row, %d in all)",
                *(p.step, grad_norm, p.skipped_in_row, p.skipped_steps),
            )
            return
        before = f", number {p.skipped_in_row} in a row," if p.skipped_in_row > 1 else ""
        raise NonFiniteLoss(
            f"step {p.step}: the gradient norm is {grad_norm}; the step{before} was not applied\n"
            f"  samples of data rank {self._mesh.dp_rank}: {everyone[self._mesh.dp_rank]} (all ranks': skipped.jsonl)\n"
            "  why: the loss or a gradient overflowed; often the learning rate is too high or the data is damaged\n"
            "  fix: lower optim.lr, lengthen schedule.warmup_tokens, skip such steps (guard.max_skipped_steps), or "
            "continue from the last checkpoint"
        )

    def look_at_losses(self) -> None:
        """Compare each loss since the last call with those before it; warn of jumps. Changes nothing that is trained.

        Call when a step is reported or saved, which waits for the device anyway. Communicates: one all-gather over dp
        and cp of two numbers per step, and one per jump. Synchronises the device.
        """
        if not self._unseen:
            return
        sigmas = self._settings.spike_sigmas
        assert sigmas is not None
        # [dp cp, n, 2]
        # A loss is a sum over the ranks with different tokens.
        everyone = gather_ranks(torch.stack([pair for _, pair, _ in self._unseen]), self._mesh.zero_group)
        for (step, _, ids), pairs in zip(self._unseen, everyone.transpose(0, 1).tolist(), strict=True):
            # exact sums: whether a save came between two steps must not show in a bit of what a checkpoint keeps
            total, count = (math.fsum(column) for column in zip(*pairs, strict=True))
            loss, window = total / count, self._progress.recent_losses
            if len(window) >= LEAST:
                mean, deviation = statistics.fmean(window), statistics.stdev(window)
                if loss > mean + sigmas * deviation:
                    self._jumped(step, loss, mean, deviation, ids)
            self._progress.recent_losses = [*window, loss][-WINDOW:]
        self._unseen.clear()

    def _jumped(self, step: int, loss: float, mean: float, deviation: float, ids: Tensor) -> None:
        # Samples of all data ranks are in the loss; rank 0 writes them.
        everyone = gather_ranks(ids.to(self._device), self._mesh.dp_group).tolist()
        _warn(
            self._mesh,
            "spike    step %d: loss %.4f, %.1f standard deviations above the mean %.4f of the steps before",
            *(step, loss, (loss - mean) / deviation if deviation else math.inf, mean),
        )
        found = {"data/step": step, "loss/total": loss, "mean": mean, "deviation": deviation, "sample_ids": everyone}
        self._write("spikes", found)

    def look_at_ranks(self, phases: Mapping[str, float]) -> dict[str, float]:
        """As `SlowRanks.look`."""
        return self._slow.look(phases)

    def close(self, *, failed: bool = False) -> None:
        """Let go of the files."""
        if self._events is not None:
            self._events.skipped.close(failed=failed)
            self._events.spikes.close(failed=failed)

    def _write(self, which: str, record: dict[str, object]) -> None:
        if self._events is None:
            return
        try:
            getattr(self._events, which).write(record)
        except OutputError as error:  # raised by the trainer on all ranks together
            self.failure = self.failure or error


class SlowRanks:
    """Warns of ranks that wait for their data or compute slowly, once per QUIET_STEPS each.

    A step ends on all ranks at once, so its length tells nothing: compared is the time before the first gradient is
    reduced, data_wait and forward. Ranks of one tp group wait for each other there, and so do all with ZeRO-3.
    """

    def __init__(self, data_wait_share: float, mesh: Mesh, device: torch.device, progress: Progress) -> None:
        self._share, self._mesh, self._device = data_wait_share, mesh, device
        self._progress = progress
        self._step, self._seconds = progress.step, progress.train_seconds
        self._warm = False
        self._quiet_until = {"data": 0, "rank": 0}
        # Warnings name the host of a slow rank, which may be any rank.
        self._hosts: list[str] = gather_objects(os.uname().nodename, mesh.world_group)

    def look(self, phases: Mapping[str, float]) -> dict[str, float]:
        """Compare the ranks over the steps since the last call; phases: this rank's seconds in them by name.

        The first call only takes note: first steps compile and fill caches. Returns what to report. Communicates: one
        all-gather over the world of three numbers.
        """
        p = self._progress
        steps, seconds = p.step - self._step, p.train_seconds - self._seconds
        self._step, self._seconds = p.step, p.train_seconds
        wait = phases.get("data_wait", 0.0)
        mine = torch.tensor(
            [wait, wait + phases.get("forward", 0.0), seconds], dtype=torch.float64, device=self._device
        )
        # A rank is slow only in comparison with the others.
        table = (gather_ranks(mine, self._mesh.world_group) / steps).tolist()
        warm, self._warm = self._warm, True
        if not warm:
            return {}
        self._data([row[0] / max(row[2], 1e-9) for row in table])
        return self._straggler([row[1] for row in table])

    def _data(self, shares: list[float]) -> None:
        worst = max(range(len(shares)), key=shares.__getitem__)
        if shares[worst] > self._share and self._may_warn("data"):
            _warn(
                self._mesh,
                "slow     %s waited for data in %.0f%% of the steps' time (guard.data_wait_share = %g)",
                *(self._name(worst), 100 * shares[worst], self._share),
            )

    def _straggler(self, own: list[float]) -> dict[str, float]:
        if len(own) == 1:
            return {}
        worst, median = max(range(len(own)), key=own.__getitem__), statistics.median(own)
        if own[worst] > STRAGGLER * median and own[worst] - median > NOISE_S and self._may_warn("rank"):
            _warn(
                self._mesh,
                "slow     %s needs %.2f s per step for data and forward, the median rank %.2f s; all wait for it",
                *(self._name(worst), own[worst], median),
            )
        return {"time/slowest_over_median": own[worst] / max(median, 1e-9)}

    def _may_warn(self, kind: str) -> bool:
        if self._progress.step < self._quiet_until[kind]:
            return False
        self._quiet_until[kind] = self._progress.step + QUIET_STEPS
        return True

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def _warn(mesh: Mesh, text: str, *values: object) -> None:
    """Once: what is found, all ranks find."""
    if mesh.is_main:
        LOGGER.warning(text, *values)


def _ids(micro_batches: list[Batch]) -> Tensor:
    return torch.cat([batch.sample_ids for batch in micro_batches])


def poisoned(loss_sum: Tensor) -> Tensor:
    """loss_sum, but with gradients of nan where its value is not finite: the step is then skipped on all ranks.

    A divergence can be infinite while its gradient is not. Bitwise the same for a finite one. Does not synchronise.
    """
    return loss_sum * torch.where(loss_sum.detach().isfinite(), 1.0, math.nan)
