"""The student under DeepSpeed ZeRO: gradient averaging, clipping and accumulation as DeepSpeed does them."""

from __future__ import annotations

import copy
import io
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.deepspeed_config import deepspeed_config
from kdtrain.distributed.collectives import gather_objects, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.engine.mixed import float32_beside_bfloat16, putting_back, refuse_float32_at_stage_3
from kdtrain.engine.optim import build_adamw
from kdtrain.engine.process import host_threads, import_muon, own_cpus
from kdtrain.engine.settings import EngineSettings
from kdtrain.errors import DataError, ParallelError
from kdtrain.log import LOGGER
from kdtrain.models.backbone import Backbone, call_with_head

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class StepResult:
    """grad_norm: global 2-norm before clipping. applied: False if it was not finite; then no update was made."""

    grad_norm: float
    applied: bool


class StudentEngine:
    """A trainable Backbone under ZeRO 0-3 with kdtrain's AdamW, schedule and normalisation by token count.

    backbone: already cut over mesh. Build it last: other engines and groups must exist before. Every rank must
    construct it. Communicates as DeepSpeed does: gradients over dp, norms over tp and dp. Raises ConfigError at stage 3
    for a bfloat16 student some of whose parameters stay in float32.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, settings: EngineSettings, *, device: torch.device) -> None:
        _check_marks(backbone, mesh)
        self.backbone = backbone
        self.mesh = mesh
        self.zero_stage: int = settings.zero.stage
        self._grad_clip = settings.optim.grad_clip
        self._norm = math.nan
        self._offloads = settings.zero.offload_optimizer
        self._threads = _threads_of_step(mesh) if self._offloads else None
        float32 = float32_beside_bfloat16(backbone, settings.dtype)
        refuse_float32_at_stage_3(list(float32), self.zero_stage)
        self.optimizer = build_adamw(backbone.hf_parameters(), settings.optim, device, offload=self._offloads)
        # before ZeRO takes shapes away
        trainable = sum(param.numel() for _, param in backbone.hf_parameters() if param.requires_grad)
        on_cuda = device.type == "cuda"
        config = copy.deepcopy(
            deepspeed_config(
                settings.zero,
                grad_clip=self._grad_clip,
                dtype=settings.dtype,
                sequences_per_micro_batch=settings.sequences_per_micro_batch,
                on_cuda=on_cuda,
                num_parameters=trainable,
            )
        )
        if self.zero_stage == 0:
            # DeepSpeed reports no norm without ZeRO, and averages it over stale groups: ours is taken in a hook.
            config["gradient_clipping"] = 0.0
            self.optimizer.register_step_pre_hook(self._clip_without_zero)
        optimizer = putting_back(self.optimizer, float32.values()) if float32 else self.optimizer
        import_muon(os.environ)
        with redirect_stdout(io.StringIO()) as printed:  # DeepSpeed's bfloat16 optimizer prints memory tables
            self.deepspeed: Any = deepspeed.initialize(
                model=backbone, optimizer=optimizer, config=config, mpu=mesh, dist_init_required=False
            )[0]
        LOGGER.debug("DeepSpeed printed while starting: %s", printed.getvalue())
        if F.linear is zero3_linear_wrap:
            F.linear = _linear  # type: ignore[assignment]

    def __call__(self, batch: Batch, head_fn: Callable[[Tensor, HeadShard], R]) -> R:
        """Result of head_fn(hidden_states [T, D], head rows), computed in the engine (ZeRO-3 gathers weights)."""
        return call_with_head(self.deepspeed, batch, head_fn)

    def backward(self, loss_sum: Tensor, num_valid_tokens: float) -> None:
        """Accumulate the gradient of loss_sum / num_valid_tokens summed over all ranks with different tokens.

        loss_sum: this rank's sum over tokens. num_valid_tokens: of the whole step, over all ranks. May be called any
        number of times before `step`, equally often on all data ranks. Raises DataError when num_valid_tokens is 0.
        """
        if not num_valid_tokens > 0:
            raise DataError(
                f"this step has {num_valid_tokens:g} valid tokens\n"
                "  why: the loss is a mean over valid tokens, and every position of the step is masked\n"
                "  fix: look at the documents of data.train; one-token documents have nothing to predict"
            )
        # DeepSpeed averages gradients over dp x cp; multiplied by the number of ranks the average is the sum.
        scale = self.mesh.zero_size / num_valid_tokens
        self.deepspeed.backward(loss_sum * scale, scale_wrt_gas=False)

    def step(self, lr: float) -> StepResult:
        """Reduce, clip and apply the accumulated gradients at learning rate `lr`.

        Communicates as DeepSpeed does: gradients over dp x cp, the norm over tp too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with _intra_op_threads(self._threads):
            self.deepspeed.step()
        norm = self._norm if self.zero_stage == 0 else float(self.deepspeed.get_global_grad_norm())
        applied = math.isfinite(norm) and bool(self.deepspeed.was_step_applied())
        if not applied and self._offloads and self.zero_stage < 3:
            self._drop_gradients()
        return StepResult(norm, applied)

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Evaluation mode inside the block: no dropout."""
        self.deepspeed.eval()
        try:
            yield
        finally:
            self.deepspeed.train()

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()

    def _drop_gradients(self) -> None:
        """Drop the gradients of a skipped step, as DeepSpeed does without offload.

        With offload and bfloat16, DeepSpeed 0.19.8 would add the next step's gradients to them, and every later step
        would be skipped too.
        """
        sums = self.deepspeed.optimizer.averaged_gradients
        sums.update(dict.fromkeys(sums))

    def _clip_without_zero(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Clip gradients, which are already reduced over dp, by their norm over tp.

        Communicates: one all-reduce (tp).
        """
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        counted = [p for p in params if self.mesh.tp_rank == 0 or getattr(p, "tensor_model_parallel", False)]
        squares = [p.grad.double().square().sum() for p in counted if p.grad is not None]
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        # Each tp rank has the squares of its own shards; all must clip by the same norm, that of the whole gradient.
        self._norm = math.sqrt(float(reduce_sum_(total, self.mesh.tp_group)))
        for param in params:
            assert param.grad is not None
            if not math.isfinite(self._norm):
                param.grad = None  # AdamW does not update parameters without a gradient: the step is skipped
            elif self._grad_clip is not None and self._norm > self._grad_clip:
                param.grad.mul_(self._grad_clip / (self._norm + 1e-6))


def _threads_of_step(mesh: Mesh) -> int | None:
    """Threads for AdamW on the host, as `host_threads`. Communicates: one gather over the world, of affinity masks.

    Ranks of a dedicated teacher are left out: their host threads only wait for the device.
    """
    host, mine = os.uname().nodename, own_cpus()
    # A launcher may have bound each rank to a part of the cores. Only the masks of all ranks on this host show how many
    # ranks share a core; without them each would start threads for all cores.
    found = gather_objects((host, mine), mesh.world_group)
    threads = host_threads(mine, [mask for name, mask in found if name == host], os.environ)
    source = "this rank's part of the cores" if threads else "OMP_NUM_THREADS"
    LOGGER.info("offload  AdamW steps on %d threads per rank: %s", threads or torch.get_num_threads(), source)
    return threads


@contextmanager
def _intra_op_threads(number: int | None) -> Iterator[None]:
    """Run the block with `number` threads of torch; None: unchanged. Forward and backward keep the former number."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """DeepSpeed's linear for weights that ZeRO-3 divides, torch's for all others.

    At stage 3 DeepSpeed replaces torch's `linear` for the whole process. Weights that ZeRO-3 does not divide, such as a
    co-hosted teacher's, do not need DeepSpeed's function, and torchao's int8 tensors, which have no t(), fail in it.
    """
    chosen = zero3_linear_wrap if hasattr(weight, "ds_id") else InsertPostInitMethodToModuleSubClasses.linear_bk
    return cast(Tensor, chosen(x, weight, bias))


def _check_marks(backbone: Backbone, mesh: Mesh) -> None:
    """ParallelError unless exactly the parameters that are cut over several ranks are marked as such.

    Of ranks that hold the same piece only the first is marked: the others would count it again.

    DeepSpeed sums the squares of marked gradients over tp and counts unmarked ones once: with a missing mark, norm and
    clipping would be wrong without an error.
    """
    for name, param in backbone.hf_parameters():
        cut = backbone.cuts.get(name)
        if cut is not None and cut.tp_size == 1:
            continue  # alone on its tp axis: both ways of counting agree
        marked = bool(getattr(param, "tensor_model_parallel", False))
        if marked != (cut is not None and not cut.is_replica(mesh.tp_rank)):
            raise ParallelError(
                f"{name} is {'replicated' if cut is None else 'cut'} over tp, but tensor_model_parallel is {marked}\n"
                "  why: the gradient norm, and with it clipping, would silently be wrong\n"
                "  fix: cut models with kdtrain.parallel.shard_model and Backbone.cuts, which set the mark"
            )
