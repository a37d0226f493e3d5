"""Metrics of a run: names, units, and weighted means over ranks without synchronising the device at every step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from kdtrain.distributed.collectives import Group, gather_objects, gather_ranks, group_rank, group_size, reduce_sum_

UNITS: dict[str, str] = {
    "data/step": "optimizer steps from 1, skipped ones included; 0 is the student before the first",
    "data/tokens_seen": "tokens over all ranks since the start of the run, padding included",
    "loss/total": "nats per valid token: kd_weight * temperature^2 * divergence + ce_weight * cross-entropy + loss/z",
    "loss/ce": "nats per valid token, student on the data, temperature 1",
    "loss/kd": "nats per valid token, the configured divergence at the loss temperature, without temperature^2",
    "loss/z": "per valid token, objective.z_loss * log-sum-exp^2 of the student's logits; part of loss/total",
    "distill/forward_kl": "nats per valid token, KL(teacher || student) at temperature 1",
    "distill/teacher_nll": "nats per valid token, teacher on the data, temperature 1",
    "distill/gap": "nats per valid token, student's minus teacher's cross-entropy",
    "distill/teacher_entropy": "nats per valid token, at the loss temperature",
    "distill/student_entropy": "nats per valid token, at the loss temperature",
    "distill/top1_agreement": "share of valid tokens whose arg-max is the same id in both models",
    "distill/tvd": "total variation distance per valid token, in [0, 1], at the loss temperature",
    "distill/overlap": "1 - distill/tvd: probability the two models share",
    "optim/lr": "learning rate of the last step",
    "optim/grad_norm": "global gradient norm of the last step, before clipping",
    "guard/skipped_steps": "steps since the start of the run that were not finite and not applied",
    "throughput/tokens_per_s": "tokens per second over all ranks since the last report, padding included",
    "throughput/tokens_per_s_per_rank": "the same divided by the number of ranks",
    "throughput/mfu": "share in [0, 1] of the devices' peak FLOP/s, student and teacher arithmetic, no recomputation",
    "throughput/teacher_flops_share": "share in [0, 1] of the arithmetic that is the teacher's",
    "throughput/teacher_time_share": "share in [0, 1] of rank 0's time spent in the teacher",
    "throughput/equal_flops_tokens_ratio": "tokens of plain cross-entropy that cost as much as one distilled token",
    "time/train_s": "seconds in optimizer steps since the start of the run",
    "time/step_s": "seconds per optimizer step, mean since the last report",
    "time/eta_s": "seconds of optimizer steps to the end of the run at the present speed",
    "time/data_wait_s": "seconds per step waiting for data, rank 0",
    "time/teacher_s": "seconds per step in the teacher, rank 0",
    "time/forward_s": "seconds per step in teacher and student forward and the loss, rank 0",
    "time/backward_s": "seconds per step in backward, rank 0",
    "time/optimizer_s": "seconds per step in the optimizer, rank 0",
    "time/slowest_over_median": "seconds per step in data_wait and forward: the slowest rank's over the ranks' median",
    "time/eval_s": "seconds the evaluation took",
    "memory/peak_allocated_gib": "GiB (2^30 bytes), most ever allocated on rank 0's CUDA device",
    "memory/peak_reserved_gib": "GiB, most ever reserved by the CUDA allocator on rank 0's device",
    "memory/host_gib": "GiB, peak resident set of rank 0's process",
    "eval/val_nll": "nats per valid token on data.validation, student, temperature 1",
    "eval/perplexity": "exp(eval/val_nll)",
    "eval/kl_to_teacher": "nats per valid token on data.validation, KL(teacher || student) at temperature 1",
    "eval/teacher_nll": "nats per valid token on data.validation, teacher, temperature 1",
    "eval/top1_agreement": "as distill/top1_agreement, on data.validation",
    "eval/tvd": "as distill/tvd, on data.validation, temperature 1",
    "eval/overlap": "1 - eval/tvd",
    "eval/teacher_entropy": "nats per valid token on data.validation, temperature 1",
    "eval/student_entropy": "nats per valid token on data.validation, temperature 1",
}
"""Unit and meaning of every key that kdtrain reports, on the console, in metrics.jsonl and in wandb."""


class Metrics:
    """Weighted means whose sums stay on the device until `reduce`.

    `add` neither synchronises nor communicates. Sums are kept in float64, one pair (total, count) per name. They are
    local to a data rank and replicated over tp, so `group` is the dp group (None: one data rank).
    """

    def __init__(self, device: torch.device, group: Group = None) -> None:
        self._device = device
        self._group = group
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """total: 0-d sum over `count` items (usually valid tokens) of this data rank, in the unit of the name."""
        pair = torch.stack([self._scalar(total), self._scalar(count)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def reduce(self) -> dict[str, float]:
        """name -> mean over everything added on all data ranks since the last call, then reset to zero.

        nan if the count is 0. Communicates over the dp group: an all-gather of one integer, which checks that the names
        are equal on all ranks, and one all-reduce of [names, 2]. Synchronises the device. Every data rank must call it;
        raises ValueError on all of them if their names differ.
        """
        names, table = self._reduced()
        self._sums.clear()
        return {n: total / count if count else float("nan") for n, (total, count) in zip(names, table, strict=True)}

    def state(self) -> dict[str, list[float]]:
        """name -> [total, count] over all data ranks, for checkpoints; the same on all ranks and in any layout.

        The sums are kept: they move to data rank 0, as in `load_state`, so that the run and a resumed one report
        bitwise the same. Communicates as `reduce`.
        """
        names, table = self._reduced()
        state = dict(zip(names, table, strict=True))
        self.load_state(state)
        return state

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue from `state()`, possibly of another number of ranks. Does not communicate."""
        keep = 1.0 if group_rank(self._group) == 0 else 0.0
        self._sums = {
            name: torch.tensor(pair, dtype=torch.float64, device=self._device) * keep for name, pair in state.items()
        }

    def _scalar(self, value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(self._device, torch.float64)
        # a fill on the device; a copy from the host would synchronise
        return torch.full((), float(value), dtype=torch.float64, device=self._device)

    def _reduced(self) -> tuple[list[str], list[list[float]]]:
        names = sorted(self._sums)
        self._check_same_names(names)
        if not names:
            return names, []
        table = torch.stack([self._sums[name] for name in names])
        # each data rank holds the sums of its own tokens only
        return names, reduce_sum_(table, self._group).tolist()

    def _check_same_names(self, names: list[str]) -> None:
        """Raise ValueError on all ranks if their names differ: the all-reduce would add unrelated sums, or hang."""
        if group_size(self._group) == 1:
            return
        digest = int.from_bytes(hashlib.sha256("\n".join(names).encode()).digest()[:7], "big")
        # before the all-reduce of the sums, whose shapes must be equal
        digests = gather_ranks(torch.tensor([digest], device=self._device), self._group).flatten().tolist()
        if any(other != digest for other in digests):
            # all ranks reach this branch together, as they compare the same digests
            everyone: list[list[str]] = gather_objects(names, self._group)
            shared = set.intersection(*(set(other) for other in everyone))
            odd = sorted({name for other in everyone for name in other} - shared)
            raise ValueError(f"data ranks added different metrics; not on every rank: {', '.join(odd)}")
