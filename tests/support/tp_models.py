"""Tiny models under tensor parallelism and the same models whole, with plain losses that use no code of kdtrain.losses.

B sequences, S tokens, D width, T = B S.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import Group, copy_to_tp, reduce_from_tp
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.models.backbone import Backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.parallel import plan_shards, shard_model

ROWS, VOCAB = 301, 299
"""The head has two rows more than the tokenizer has tokens; at tp 4 one rank holds only padding."""


@dataclasses.dataclass(frozen=True, slots=True)
class Parts:
    """Like LossParts: a frozen, slotted dataclass in which one field carries the gradient."""

    loss: Tensor
    ce: Tensor


def stock_model(family: str, **changes: Any) -> Any:
    """A random float32 model; norms and biases are random too, because ones and zeros would hide a double use."""
    settings = tiny_config(family, vocab_size=ROWS, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.dtype = torch.float32
    torch.manual_seed(5)
    attention = "eager" if config.model_type == "gemma2" else "sdpa"  # Gemma 2 has no sdpa
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    for name, param in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(param, mean=0.5, std=0.3)
    return model


def packed_batch(length: int = 13) -> Batch:
    """Two sequences of several documents each, with one masked label."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, VOCAB, (2, length), generator=generator)
    ids[0, 3] = ids[1, 0] = 2  # smollm's padding id
    positions = torch.tensor([[*range(5), *range(length - 5)], [*range(1), *range(1), *range(length - 2)]])
    labels = torch.randint(0, VOCAB, (2, length), generator=generator)
    mask = torch.ones(2, length)
    mask[0, 4] = 0
    return Batch(ids, labels, mask, positions, torch.arange(2))


def direction(hidden: Tensor) -> Tensor:
    """Random weights of the shape of `hidden`, for a linear loss."""
    return torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=hidden.dtype)


def reference(
    family: str, changes: dict[str, Any], kind: str, length: int = 13
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(hidden [T, D], loss, gradients by name) of the stock model, with its own head and logits."""
    model = stock_model(family, **changes).train()
    batch = packed_batch(length)
    out = model.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    hidden = out.last_hidden_state.flatten(0, 1)
    if kind == "hidden":
        loss = (hidden * direction(hidden)).sum()
    else:
        logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits.flatten(0, 1)
        losses = F.cross_entropy(logits[:, :VOCAB], batch.labels.flatten(), reduction="none")
        loss = (losses * batch.loss_mask.flatten()).sum()
    loss.backward()
    return hidden.detach(), loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def cross_entropy_head(batch: Batch, shard: VocabShard, group: Group) -> Callable[[Tensor, HeadShard], Parts]:
    """A plain differentiable vocabulary-parallel cross-entropy."""

    def head_fn(hidden: Tensor, head: HeadShard) -> Parts:
        hidden = copy_to_tp(hidden, group)
        rows = shard.valid_rows
        logits = hidden @ head.weight[:rows].T * head.logit_scale
        if head.bias is not None:
            logits = logits + head.bias[:rows]
        if head.softcap is not None:
            logits = head.softcap * torch.tanh(logits / head.softcap)
        labels = batch.labels.flatten() - shard.start
        mine = (labels >= 0) & (labels < rows)
        sums = reduce_from_tp(logits.exp().sum(-1), group)
        picked = F.pad(logits, (0, 1)).gather(1, labels.where(mine, rows)[:, None])[:, 0]
        losses = sums.log() - reduce_from_tp(picked * mine, group)
        return Parts((losses * batch.loss_mask.flatten()).sum(), losses.detach())

    return head_fn


def sharded_backbone(family: str, changes: dict[str, Any], mesh: Mesh, sequence: bool = False) -> Backbone:
    """`stock_model`, sharded for this rank of `mesh`."""
    model = stock_model(family, **changes)
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size, total_rows=ROWS)
    specs = plan_shards(model, mesh.tp_size, shard.rows)
    return Backbone(shard_model(model, mesh, shard, sequence=sequence), shard, specs)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest deviation over the largest entry."""
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))
