"""A frozen model whose weights ZeRO-3 holds in pieces over the data ranks, perhaps in host memory."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from typing import Any, cast

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn

from kdtrain.config.deepspeed_config import frozen_config
from kdtrain.data.batch import Batch
from kdtrain.dist.mesh import Mesh
from kdtrain.dist.vocab import HeadShard
from kdtrain.engine.process import import_muon
from kdtrain.log import LOGGER
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import move_buffers
from kdtrain.parallel.experts import expert_modules


class _Body(nn.Module):
    """A root for DeepSpeed's hooks that stops before the head, which is then never gathered."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch: Batch) -> Tensor:
        return self.backbone.hidden_states(batch)


class FrozenEngine:
    """Hidden states of a frozen Backbone under ZeRO-3 without an optimizer.

    backbone: frozen, cut over mesh already, in host memory, where every rank must have room for it once; parameter by
    parameter its weights are divided among mesh's data ranks and freed elsewhere. mesh: the teacher's own. offload:
    keep the pieces in host memory. Build it before the student's engine. Every rank must construct it, and call it
    equally often with batches of one shape. Communicates: per layer and call one all-gather of its weights over the
    data ranks.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, *, device: torch.device, dtype: str, offload: bool) -> None:
        full = backbone.lm_head_shard
        bias = None if full.bias is None else full.bias.detach().to(device, copy=True)
        # The loss multiplies with these rows outside of any module: they stay whole on this rank.
        self.head = HeadShard(full.weight.detach().to(device, copy=True), bias, full.logit_scale, full.softcap)
        body = _Body(backbone)
        for _, experts in expert_modules(backbone):
            # How often experts call what is inside them depends on a rank's tokens, but DeepSpeed fetches ahead in the
            # order of calls it recorded, which must be the same on all ranks. Nothing is recorded inside a leaf.
            set_z3_leaf_module(experts, True)
        import_muon(os.environ)
        with redirect_stdout(io.StringIO()) as said:
            # Before `initialize`, which would first move an undivided model to the device, whole.
            deepspeed.zero.Init(
                module=body, data_parallel_group=mesh.get_data_parallel_group(),
                config_dict_or_path=frozen_config(dtype, offload=offload), mpu=mesh,
            )  # fmt: skip
            move_buffers(body, device)
            self.deepspeed: Any = deepspeed.initialize(
                model=body, config=frozen_config(dtype, offload=offload), mpu=mesh, dist_init_required=False
            )[0]
        LOGGER.debug("DeepSpeed said while starting the frozen engine: %s", said.getvalue())
        self.deepspeed.eval()

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """[T, E] of a batch, replicated over tp."""
        return cast(Tensor, self.deepspeed(batch))

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self.deepspeed.destroy()
