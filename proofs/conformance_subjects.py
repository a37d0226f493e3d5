"""What `python -m kdtrain.testing.conformance` runs: kdtrain's losses and those of published packages, as installed.

Peers are called, never copied; `pip install nvidia-modelopt megatron-core` has them, a CPU is enough. The losses of
nvidia-modelopt take their tensor-parallel group from megatron-core's parallel_state. As Megatron-LM's loss function
treats them: each rank has a partial full-vocabulary loss, summed without autograd for the report, while backward starts
from the rank's own part; the top-k loss is whole on every rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kdtrain.losses import linear_cross_entropy, linear_kd_loss, linear_sparse_kd_loss, reference
from kdtrain.losses.types import SparseTarget
from kdtrain.teacher.topk import linear_topk
from kdtrain.testing.conformance import DENSE_MODES, Mode, Subject


def kd(hidden_s, head_s, hidden_t, head_t, labels, *, group, shard, **divergence):
    ones = torch.ones(len(labels), dtype=hidden_s.dtype)
    return linear_kd_loss(
        hidden_s,
        head_s,
        hidden_t,
        head_t,
        labels,
        kd_weight=ones,
        ce_weight=torch.zeros_like(ones),
        shard=shard,
        group=group,
        slab_bytes=1 << 13,
        **divergence,
    ).loss


def cross_entropy(hidden_s, head_s, hidden_t, head_t, labels, *, group, shard, **unused):
    ones = torch.ones(len(labels), dtype=hidden_s.dtype)
    return linear_cross_entropy(hidden_s, head_s, labels, weight=ones, shard=shard, group=group).loss


def sparse(hidden_s, head_s, hidden_t, head_t, labels, *, group, shard, **mode):
    """The teacher's top_k ids with the rest as one bucket, or both models renormalised on the ids."""
    temperature, renormalise = mode["temperature"], mode["renormalise"]
    found = linear_topk(hidden_t, head_t, mode["top_k"], shard=shard, group=group, temperatures=(temperature,))
    weights = (found.logits / temperature - found.lse).exp()
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    entropy, unused = -torch.special.xlogy(weights, weights).sum(-1), torch.zeros_like(weights[:, 0])
    ones = torch.ones(len(labels), dtype=hidden_s.dtype)
    return linear_sparse_kd_loss(
        hidden_s,
        head_s,
        SparseTarget(found.ids, weights, None if renormalise else found.log_tail[:, 0], unused, entropy),
        labels,
        divergence=mode["divergence"],
        temperature=temperature,
        kd_weight=ones,
        ce_weight=torch.zeros_like(ones),
        shard=shard,
        group=group,
        slab_bytes=1 << 13,
        allow_biased=True,
        renormalise_student=renormalise,
    ).loss


def sparse_by_definition(student, teacher, labels, *, divergence, temperature, top_k, renormalise):
    """The divergence between both models' distributions over the teacher's top_k ids and, unless renormalised, the
    rest as one more id."""
    if renormalise:
        return both_renormalised(student, teacher, labels, divergence=divergence, temperature=temperature, top_k=top_k)
    ids, pair = teacher.topk(top_k, dim=-1).indices, []
    for logits in (student, teacher):
        log_p = (logits / temperature).log_softmax(-1)
        rest = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        pair.append(torch.cat([log_p.gather(-1, ids), rest], -1))
    return reference.DIVERGENCES[divergence](*pair)


def _megatron_config(group):
    """The fields of TransformerConfig the losses read, and megatron-core's groups: all ranks are one tp group."""
    from types import SimpleNamespace

    from megatron.core import parallel_state

    tp = torch.distributed.get_world_size(group)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return SimpleNamespace(tensor_model_parallel_size=tp, sequence_parallel=False)


def _modelopt(loss, student, teacher):
    """[T, v] as [sequence, batch, v]; the sum over tokens of what the loss returns first."""
    per_token, *_ = loss(student[:, None], teacher[:, None])
    return per_token.sum()


def modelopt_full(student, teacher, labels, *, group, shard, divergence, temperature):
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    config = _megatron_config(group)
    return _modelopt(LogitsKLLoss(config, temperature, reverse=divergence == "reverse_kl"), student, teacher)


def modelopt_top_k(student, teacher, labels, *, group, shard, divergence, temperature, top_k):
    from modelopt.torch.distill.plugins.megatron import TopKLogitsKLLoss

    config = _megatron_config(group)
    loss = TopKLogitsKLLoss(config, temperature, reverse=divergence == "reverse_kl", top_k=top_k)
    return _modelopt(loss, student, teacher)


def both_renormalised(student, teacher, labels, *, divergence, temperature, top_k):
    """The divergence between both models' distributions over the teacher's top_k ids, as modelopt defines it."""
    ids = teacher.topk(top_k, dim=-1).indices
    return reference.DIVERGENCES[divergence](student.gather(-1, ids), teacher.gather(-1, ids), temperature=temperature)


def torch_kl_div(student, teacher, labels, *, group, shard, divergence, temperature):
    """A single-rank formula on a sharded vocabulary: every rank normalises over its own columns only."""
    log_q, log_p = (F.log_softmax(x / temperature, -1) for x in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="sum", log_target=True) * temperature**2


OTHERS = ("skew_kl", "skew_reverse_kl", "tvd", "alpha_beta", "logit_mse")
FAMILIES = (*DENSE_MODES, *(Mode(name, 2.0) for name in OTHERS))
KL_MODES = tuple(mode for mode in DENSE_MODES if mode.divergence != "jsd")
SPARSE = (
    *(Mode(mode.divergence, mode.temperature, {"top_k": 8, "renormalise": False}) for mode in DENSE_MODES),
    *(Mode(mode.divergence, mode.temperature, {"top_k": 8, "renormalise": True}) for mode in KL_MODES),
)
MODELOPT = {
    "needs": ("modelopt.torch.distill.plugins.megatron",),
    "packages": ("nvidia-modelopt", "megatron-core"),
    "temperature_squared": False,
}

SUBJECTS = [
    Subject(name="kdtrain linear_kd_loss", loss=kd, on="hidden", modes=FAMILIES),
    Subject(name="kdtrain linear_cross_entropy", loss=cross_entropy, on="hidden", modes=(Mode("cross_entropy"),)),
    Subject(
        name="kdtrain linear_sparse_kd_loss", loss=sparse, on="hidden", modes=SPARSE, expected=sparse_by_definition
    ),
    Subject(name="modelopt LogitsKLLoss", loss=modelopt_full, modes=KL_MODES, value="partial", **MODELOPT),
    Subject(
        name="modelopt TopKLogitsKLLoss",
        loss=modelopt_top_k,
        modes=tuple(Mode(mode.divergence, mode.temperature, {"top_k": 8}) for mode in KL_MODES),
        expected=both_renormalised,
        **MODELOPT,
    ),
    Subject(name="torch F.kl_div per rank", loss=torch_kl_div, modes=(Mode("forward_kl"),), value="partial"),
]
