"""Argument checks of the streamed losses: one ValueError naming the argument, its value and what is allowed.

No check reads a tensor's contents on an accelerator, which would synchronise it; labels are checked there by an
assertion on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses.stream import bytes_per_token, is_token
from kdtrain.losses.vocab_group import VocabGroup


def check_model(role: str, hidden: Tensor, head: HeadShard, shard: VocabShard) -> None:
    """Require matching hidden [T, D] and head.weight [shard.rows, D]. `role`: suffix of the argument names."""
    weight, hidden_name, head_name = head.weight, f"hidden{role}", f"head{role}"
    if hidden.ndim != 2:
        raise ValueError(f"{hidden_name} has shape {tuple(hidden.shape)}, need [tokens, width]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{head_name} has shape {tuple(weight.shape)}, need [rows, {hidden.shape[1]}] as {hidden_name}"
        )
    if weight.shape[0] != shard.rows:
        raise ValueError(
            f"{head_name} has {weight.shape[0]} rows, need {shard.rows}: shard [{shard.start}, {shard.stop})"
        )
    if not hidden.dtype.is_floating_point:
        raise ValueError(f"{hidden_name} has dtype {hidden.dtype}, need a floating-point one")
    for name, tensor in ((head_name, weight), (f"{head_name}.bias", head.bias)):
        if tensor is not None and (tensor.dtype != hidden.dtype or tensor.device != hidden.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, need {hidden.dtype} on {hidden.device} as {hidden_name}"
            )
    if head.bias is not None and head.bias.shape != (shard.rows,):
        raise ValueError(f"{head_name}.bias has shape {tuple(head.bias.shape)}, need ({shard.rows},)")
    if head.softcap is not None and not 0 < head.softcap < math.inf:
        raise ValueError(f"{head_name}.softcap = {head.softcap}, need a number > 0 or None")
    if not math.isfinite(head.logit_scale):
        raise ValueError(f"{head_name}.logit_scale = {head.logit_scale}, need a finite number")


def check_teacher(hidden_s: Tensor, hidden_t: Tensor) -> None:
    """Require hidden states of the same tokens on the same device."""
    if hidden_t.shape[0] != hidden_s.shape[0]:
        raise ValueError(f"hidden_t has {hidden_t.shape[0]} tokens, need {hidden_s.shape[0]} as hidden_s")
    if hidden_t.device != hidden_s.device:
        raise ValueError(f"hidden_t is on {hidden_t.device}, need {hidden_s.device} as hidden_s")


def check_labels_and_weights(labels: Tensor, weights: dict[str, Tensor], hidden: Tensor) -> None:
    """Require labels [T] of integers and weights [T] of floating point without gradient, all on hidden's device."""
    for name, tensor in {"labels": labels, **weights}.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, need a tensor of one value per token")
        if tensor.shape != hidden.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, need ({hidden.shape[0]},): one per token")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, need {hidden.device} as the hidden states")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels has dtype {labels.dtype}, need int64 or int32")
    for name, weight in weights.items():
        if not weight.dtype.is_floating_point:
            raise ValueError(f"{name} has dtype {weight.dtype}, need a floating-point one")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires a gradient, need a constant: losses are not differentiated by weights")
        finite = weight.isfinite().all()
        if weight.device.type != "cpu":
            torch._assert_async(finite)
        elif not finite:
            raise ValueError(f"{name} holds NaN or infinity, need finite numbers")


def check_label_range(labels: Tensor, weight: Tensor, shard: VocabShard) -> None:
    """Labels with a non-zero weight must be tokens. ValueError on the CPU; an assertion on the device elsewhere."""
    bad = (weight != 0) & ~is_token(labels, shard)
    if labels.device.type != "cpu":
        torch._assert_async(~bad.any())
    elif bool(bad.any()):
        place = int(bad.nonzero()[0])
        raise ValueError(
            f"labels[{place}] = {int(labels[place])}, need one in [0, {shard.vocab_size}) because its weight is "
            f"{float(weight[place]):g}; give positions without a label the weight 0"
        )


def check_slab_bytes(slab_bytes: int, vocab: VocabGroup, work: torch.dtype) -> None:
    """Require room for the logits of at least one token per chunk in flight."""
    least = bytes_per_token(vocab, work)
    if not isinstance(slab_bytes, int):
        raise ValueError(f"slab_bytes = {slab_bytes!r}, need a whole number of bytes")
    if slab_bytes < least:
        raise ValueError(f"slab_bytes = {slab_bytes}, need at least {least}: both models' logits of one token")


def check_main_grad(main_grad: Tensor | None, weight: Tensor, work: torch.dtype) -> None:
    """Require a buffer [v, D] in the working dtype, on the device of a head that requires a gradient."""
    if main_grad is None:
        return
    if main_grad.shape != weight.shape or main_grad.dtype != work or main_grad.device != weight.device:
        raise ValueError(
            f"main_grad is {tuple(main_grad.shape)} {main_grad.dtype} on {main_grad.device}, need "
            f"{tuple(weight.shape)} {work} on {weight.device}: the head's gradient is accumulated in it"
        )
    if not (weight.requires_grad and torch.is_grad_enabled()):
        raise ValueError("main_grad is given, but the head requires no gradient; leave it out")
