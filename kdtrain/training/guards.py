"""Checks of a long run's steps: gradients that are not finite, loss spikes, slow ranks.

Only the first one changes or ends the run. Rank 0 records skipped steps and spikes in skipped.jsonl and spikes.jsonl of
the run folder.
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
from kdtrain.stores.keys import KeySpace
from kdtrain.telemetry.jsonl_sink import JsonlSink
from kdtrain.training.progress import Progress

WINDOW = 100
"""Number of recent losses that a new one is compared with."""
LEAST = 20
"""With fewer recent losses no spike is reported: their mean and deviation are too uncertain."""
STRAGGLER = 1.5
"""A rank is reported as slow from this ratio of its time to the median."""
NOISE_S = 0.02
"""Differences between ranks below this many seconds per step are scheduling noise."""
QUIET_STEPS = 100
"""Steps after a warning of slow data or of a slow rank during which it is not repeated."""


@dataclass(frozen=True, slots=True)
class Events:
    """Files for skipped steps and spikes; on rank 0 only."""

    skipped: JsonlSink
    spikes: JsonlSink


class Guards:
    """The guards of one run. Every rank holds one and calls the same methods at the same steps.

    progress: of the run. The guards' state is kept in it, so that a resumed run continues as if it had not stopped.
    keys: of the run's stores; with them messages and files name samples by store and number.
    """

    def __init__(
        self,
        settings: GuardSection,
        mesh: Mesh,
        device: torch.device,
        progress: Progress,
        events: Events | None = None,
        keys: KeySpace | None = None,
    ) -> None:
        self._settings, self._mesh, self._device = settings, mesh, device
        self._progress = progress
        self._events, self._keys = events, keys
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []  # step, [loss, valid tokens] of this rank, sample ids
        self._slow = SlowRanks(settings.data_wait_share, mesh, device, progress)
        self.failure: OutputError | None = None
        """The first error of this rank when it wrote one of its files; None without one."""

    def applied(self, micro_batches: list[Batch], sums: list[tuple[Tensor, Tensor]]) -> None:
        """Record the last step of `progress` as applied. sums: (loss, valid tokens) of its micro-batches, 0-d.

        Does not communicate and does not synchronise the device.
        """
        self._progress.skipped_in_row = 0
        if self._settings.spike_sigmas is not None:
            pair = torch.stack([torch.stack([loss.detach().double(), count.double()]) for loss, count in sums]).sum(0)
            self._unchecked.append((self._progress.step, pair, _ids(micro_batches)))

    def skipped(self, micro_batches: list[Batch], grad_norm: float) -> None:
        """Record the last step of `progress` as skipped on all ranks, as it was not finite on one.

        Communicates: one all-gather over dp of the step's sample ids. Raises NonFiniteLoss on all ranks after more
        than guard.max_skipped_steps in a row.
        """
        p, most = self._progress, self._settings.max_skipped_steps
        p.skipped_steps += 1
        p.skipped_in_row += 1
        # rank 0 records the samples of all data ranks: any of them may have caused the overflow
        everyone = gather_ranks(_ids(micro_batches).to(self._device), self._mesh.dp_group).tolist()
        self._write("skipped", {"data/step": p.step, "grad_norm": str(grad_norm), **self._samples(everyone)})
        if p.skipped_in_row <= most:
            _warn(
                self._mesh,
                "skipped  step %d: the gradient norm is %s; weights and optimizer stay (%d in a row, %d in all)",
                *(p.step, grad_norm, p.skipped_in_row, p.skipped_steps),
            )
            return
        ids = everyone[self._mesh.dp_rank]
        by_store = {} if self._keys is None else self._keys.by_store(ids)
        mine = "; ".join(f"{store} {numbers}" for store, numbers in by_store.items()) or ids
        before = f", number {p.skipped_in_row} in a row," if p.skipped_in_row > 1 else ""
        raise NonFiniteLoss(
            f"step {p.step}: the gradient norm is {grad_norm}; the step{before} was not applied\n"
            f"  samples of data rank {self._mesh.dp_rank}: {mine} (all ranks': skipped.jsonl)\n"
            "  why: the loss or a gradient overflowed; often the learning rate is too high or the data is damaged\n"
            "  fix: lower optim.lr, lengthen schedule.warmup_tokens, skip such steps (guard.max_skipped_steps), or "
            "continue from the last checkpoint"
        )

    def check_losses(self) -> None:
        """Compare each loss since the last call with those before it, and warn of spikes. Does not change the run.

        Called when a step is reported or saved, which synchronises the device anyway. Communicates: one all-gather over
        dp and cp of two numbers per step, and one over dp per spike. Synchronises the device.
        """
        if not self._unchecked:
            return
        sigmas = self._settings.spike_sigmas
        assert sigmas is not None
        # each rank holds the loss of its own tokens; the step's mean needs all of them. [dp cp, n, 2]
        everyone = gather_ranks(torch.stack([pair for _, pair, _ in self._unchecked]), self._mesh.zero_group)
        for (step, _, ids), pairs in zip(self._unchecked, everyone.transpose(0, 1).tolist(), strict=True):
            # fsum is exact: the means, which checkpoints keep, do not depend on how many steps are gathered at once
            total, count = (math.fsum(column) for column in zip(*pairs, strict=True))
            loss, window = total / count, self._progress.recent_losses
            if len(window) >= LEAST:
                mean, deviation = statistics.fmean(window), statistics.stdev(window)
                if loss > mean + sigmas * deviation:
                    self._report_spike(step, loss, mean, deviation, ids)
            self._progress.recent_losses = [*window, loss][-WINDOW:]
        self._unchecked.clear()

    def _report_spike(self, step: int, loss: float, mean: float, deviation: float, ids: Tensor) -> None:
        # rank 0 records the samples of all data ranks: the spike may come from any of them
        everyone = gather_ranks(ids.to(self._device), self._mesh.dp_group).tolist()
        _warn(
            self._mesh,
            "spike    step %d: loss %.4f, %.1f standard deviations above the mean %.4f of the steps before",
            *(step, loss, (loss - mean) / deviation if deviation else math.inf, mean),
        )
        found = {"data/step": step, "loss/total": loss, "mean": mean, "deviation": deviation}
        self._write("spikes", found | self._samples(everyone))

    def _samples(self, everyone: list[list[int]]) -> dict[str, object]:
        """Fields of a record: the samples of every data rank, by key and, if the stores are known, by store."""
        keys = self._keys
        named = {} if keys is None else {"samples": [keys.by_store(ids) for ids in everyone]}
        return {"sample_ids": everyone, **named}

    def check_ranks(self, phases: Mapping[str, float]) -> dict[str, float]:
        """As `SlowRanks.check`."""
        return self._slow.check(phases)

    def close(self, *, failed: bool = False) -> None:
        """Close the files. failed: the run ends with an error."""
        if self._events is not None:
            self._events.skipped.close(failed=failed)
            self._events.spikes.close(failed=failed)

    def _write(self, which: str, record: dict[str, object]) -> None:
        if self._events is None:
            return
        try:
            getattr(self._events, which).write(record)
        except OutputError as error:  # the trainer reduces `failure` and raises on all ranks at the same step
            self.failure = self.failure or error


class SlowRanks:
    """Warns of ranks that wait for data or compute slowly, at most once per QUIET_STEPS for each of the two.

    A step takes equally long on all ranks, as they wait for each other in collectives. So the time before the first
    gradient reduction is compared: data_wait and forward. Even in it the ranks of a tp group, and with ZeRO-3 all
    ranks, wait for each other.
    """

    def __init__(self, data_wait_share: float, mesh: Mesh, device: torch.device, progress: Progress) -> None:
        self._share, self._mesh, self._device = data_wait_share, mesh, device
        self._progress = progress
        self._step, self._seconds = progress.step, progress.train_seconds
        self._warm = False
        self._quiet_until = {"data": 0, "rank": 0}
        # every rank logs or ignores the same warning, and rank 0 names the host of any rank
        self._hosts: list[str] = gather_objects(os.uname().nodename, mesh.world_group)

    def check(self, phases: Mapping[str, float]) -> dict[str, float]:
        """Compare the ranks over the steps since the last call and return metrics. phases: this rank's seconds by name.

        The first call reports nothing, as the first steps compile and fill caches. Communicates: one all-gather over
        the world of three numbers.
        """
        p = self._progress
        steps, seconds = p.step - self._step, p.train_seconds - self._seconds
        self._step, self._seconds = p.step, p.train_seconds
        wait = phases.get("data_wait", 0.0)
        mine = torch.tensor(
            [wait, wait + phases.get("forward", 0.0), seconds], dtype=torch.float64, device=self._device
        )
        # a slow rank is visible only in comparison with all others
        table = (gather_ranks(mine, self._mesh.world_group) / steps).tolist()
        warm, self._warm = self._warm, True
        if not warm:
            return {}
        self._check_data([row[0] / max(row[2], 1e-9) for row in table])
        return self._check_time([row[1] for row in table])

    def _check_data(self, shares: list[float]) -> None:
        worst = max(range(len(shares)), key=shares.__getitem__)
        if shares[worst] > self._share and self._may_warn("data"):
            _warn(
                self._mesh,
                "slow     %s waited for data in %.0f%% of the steps' time (guard.data_wait_share = %g)",
                *(self._name(worst), 100 * shares[worst], self._share),
            )

    def _check_time(self, own: list[float]) -> dict[str, float]:
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
    """Log once per job: all ranks compute the same warning."""
    if mesh.is_main:
        LOGGER.warning(text, *values)


def _ids(micro_batches: list[Batch]) -> Tensor:
    return torch.cat([batch.sample_ids for batch in micro_batches])


def nan_if_nonfinite(loss_sum: Tensor) -> Tensor:
    """loss_sum (0-d), whose gradients are nan if its value is not finite, so that the step is skipped on all ranks.

    A divergence can be infinite while its gradient is finite. A finite value and its gradients keep their bits. Does
    not synchronise the device.
    """
    return loss_sum * torch.where(loss_sum.detach().isfinite(), 1.0, math.nan)
