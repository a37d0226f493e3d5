"""A frozen model whose weights ZeRO-3 divides among the data ranks, optionally in host memory."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from kdtrain.batch import Batch
from kdtrain.config.deepspeed_config import frozen_config
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.engine.process import import_muon
from kdtrain.log import LOGGER
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import move_buffers
from kdtrain.parallel.experts import expert_modules


class _Body(nn.Module):
    """The root module for DeepSpeed's hooks. It ends before the head, which is therefore never gathered."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> Tensor:
        return self.backbone.hidden_states(batch)


class FrozenEngine:
    """Hidden states of a frozen Backbone under ZeRO-3 without an optimizer.

    backbone: frozen, cut over mesh already, in host memory, where every rank must have room for it once; parameter by
    parameter its weights are divided among mesh's data ranks and freed elsewhere. mesh: the teacher's own. offload:
    keep the parts in host memory. Build it before the student's engine. Every rank must construct it, and call it
    equally often with batches of one shape. Communicates: per layer and call one all-gather of its weights over the
    data ranks.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, *, device: torch.device, dtype: str, offload: bool) -> None:
        full = backbone.lm_head_shard
        bias = None if full.bias is None else full.bias.detach().to(device, copy=True)
        # The loss uses these rows outside of any module, where DeepSpeed gathers nothing: they stay whole on this rank.
        self.head = HeadShard(full.weight.detach().to(device, copy=True), bias, full.logit_scale, full.softcap)
        body = _Body(backbone)
        for _, experts in expert_modules(backbone):
            # Which modules inside the experts run depends on a rank's tokens, but DeepSpeed prefetches weights in the
            # order of calls that it recorded, which must be the same on all ranks. It records nothing inside a leaf.
            set_z3_leaf_module(experts, True)
        import_muon(os.environ)
        with redirect_stdout(io.StringIO()) as printed:
            # Before `initialize`, which would first move an undivided model to the device.
            deepspeed.zero.Init(
                module=body,
                data_parallel_group=mesh.get_data_parallel_group(),
                config_dict_or_path=frozen_config(dtype, offload=offload),
                mpu=mesh,
            )
            move_buffers(body, device)
            self.deepspeed: Any = deepspeed.initialize(
                model=body, config=frozen_config(dtype, offload=offload), mpu=mesh, dist_init_required=False
            )[0]
        LOGGER.debug("DeepSpeed printed while starting the frozen engine: %s", printed.getvalue())
        self.deepspeed.eval()

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """[T, E] of a batch, replicated over tp."""
        return cast(Tensor, self.deepspeed(batch))

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self.deepspeed.destroy()
