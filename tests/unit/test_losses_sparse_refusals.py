"""Refusals of the sparse loss by name, value and rule; and refused cells of the matrix with their reason."""

from dataclasses import replace

import pytest
import torch
from kdtrain_kernels import sparse_dispatch, sparse_rows

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_sparse_kd_loss, matrix, reference
from tests.support.sparse_cases import sparse_case

GOOD = sparse_case(9, 101, "top_k_tail")
SAMPLED = sparse_case(9, 101, "sampled").target


def call(**changes):
    case = GOOD.base
    arguments = {
        "hidden_s": case.hidden_s,
        "head_s": case.head_s,
        "target": GOOD.target,
        "labels": torch.arange(9),
        "kd_weight": torch.ones(9),
        "ce_weight": torch.ones(9),
        "shard": VocabShard.of(101, multiple=1),
        **changes,
    }
    return linear_sparse_kd_loss(**arguments)


def record(of=GOOD.target, **changes):
    return {"target": replace(of, **changes)}


def changed(tensor, place, value):
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


IDS, WEIGHTS, TAIL = GOOD.target.ids, GOOD.target.weights, GOOD.target.log_tail
TWICE = changed(IDS, (2, slice(0, 2)), 7)
NO_TAIL = record(log_tail=None)

BAD = {
    "unknown divergence": ({"divergence": "kl"}, r"divergence = 'kl' is unknown; choose one of forward_kl"),
    "temperature": ({"temperature": 0.0}, r"temperature = 0.0, need a finite number > 0"),
    "jsd share": ({"divergence": "jsd", "teacher_share": 1.5}, r"teacher_share = 1.5 must be in \[0, 1\]"),
    "skew": ({"divergence": "skew_kl", "skew": 1.0}, r"skew = 1.0 must be in \[0, 1\)"),
    "head width": ({"head_s": torch.zeros(101, 17)}, r"head_s has shape \(101, 17\), need \[rows, 16\]"),
    "label count": ({"labels": torch.arange(8)}, r"labels has shape \(8,\), need \(9,\)"),
    "label range": ({"labels": torch.full((9,), 101)}, r"labels\[0\] = 101, need one in \[0, 101\)"),
    "weight dtype": ({"kd_weight": torch.ones(9).bool()}, r"kd_weight has dtype torch.bool, need a floating"),
    "no divergence weight": ({"kd_weight": None}, r"kd_weight is a NoneType, need a tensor of one value per token"),
    "no label weight": ({"ce_weight": None}, r"ce_weight is a NoneType, need a tensor of one value per token"),
    "shard": (
        {"shard": VocabShard(0, 128, 101, 1, 2)},
        r"shard is slice 1 of 2, but this is rank 0 of a group of 1",
    ),
    "infinite weight": ({"ce_weight": torch.full((9,), float("inf"))}, r"ce_weight holds NaN or infinity"),
    "z weight": ({"z_weight": torch.ones(8)}, r"z_weight has shape \(8,\), need \(9,\)"),
    "slab": ({"slab_bytes": 1023}, r"slab_bytes = 1023, need at least 1024"),
    "main grad": (
        {"main_grad": torch.zeros(101, 3)},
        r"main_grad is \(101, 3\) torch.float32 on cpu, need \(101, 16\)",
    ),
    "backend": ({"backend": "triton-on-paper"}, r"backend = 'triton-on-paper' is not available for cpu"),
    "ids shape": (record(ids=IDS[0]), r"target.ids has shape \(12,\), need \(9, K\) with K >= 1"),
    "ids tokens": (record(ids=IDS[:8]), r"target.ids has shape \(8, 12\), need \(9, K\)"),
    "no slots": (record(ids=IDS[:, :0]), r"target.ids has shape \(9, 0\), need \(9, K\) with K >= 1"),
    "ids dtype": (record(ids=IDS.short()), r"target.ids has dtype torch.int16, need int32 or int64"),
    "ids device": (record(ids=IDS.to("meta")), r"target.ids is on meta, need cpu as the hidden states"),
    "weights shape": (record(weights=WEIGHTS[:, :3]), r"target.weights has shape \(9, 3\), need \(9, 12\)"),
    "weights dtype": (record(weights=IDS), r"target.weights has dtype torch.int32, need a floating-point one"),
    "tail shape": (record(log_tail=TAIL[:8]), r"target.log_tail has shape \(8,\), need \(9,\)"),
    "entropy shape": (record(entropy=TAIL[:8]), r"target.entropy has shape \(8,\), need \(9,\)"),
    "unbiased with a tail": (record(unbiased=True), r"target.unbiased = True with a log_tail"),
    "id too large": (record(ids=changed(IDS, (3, 1), 101)), r"need be in \[0, 101\), or -1; token 3 has \["),
    "id too small": (record(ids=changed(IDS, (3, 1), -2)), r"need be in \[0, 101\), or -1; token 3 has \["),
    "id twice": (record(ids=TWICE), r"target.ids hold an id twice; merge_duplicates merges them; token 2 has"),
    "negative weight": (record(weights=changed(WEIGHTS, (1, 0), -0.1)), r"need be finite, >= 0, .*; token 1 has"),
    "nan weight": (record(weights=changed(WEIGHTS, (1, 0), float("nan"))), r"need be finite, >= 0, .*; token 1 has"),
    "weight of an empty slot": (
        record(ids=changed(IDS, slice(None), -1)),
        r"and 0 where the id is -1; token 0 has",
    ),
    "sum": (record(log_tail=changed(TAIL, 5, 0.5)), r"exp\(target.log_tail\) need sum to 1; token 5 has [12]\."),
    "nan tail": (record(log_tail=changed(TAIL, 5, float("nan"))), r"need sum to 1; token 5 has nan"),
    "unknown entropy": (
        record(SAMPLED, entropy=changed(SAMPLED.entropy, 6, float("nan"))),
        r"target.entropy needs be finite.*; token 6 has nan",
    ),
    "biased top-k": (
        NO_TAIL,
        r"'forward_kl' on target = 'top_k' is biased: the teacher's probability outside .*; allow_biased=True accepts",
    ),
    "biased sampled": (
        {**record(SAMPLED), "divergence": "jsd"},
        r"'jsd' on target = 'sampled' is biased: it is not linear in the weights",
    ),
    "biased conditional": ({"renormalise_student": True}, r"on target = 'conditional' is biased: the student's prob"),
    "infinite": (
        {**NO_TAIL, "divergence": "reverse_kl", "allow_biased": True},
        r"'reverse_kl' on target = 'top_k' is refused: it is infinite wherever the student gives probability",
    ),
    "infinite at the end of a range": (
        {**NO_TAIL, "divergence": "jsd", "teacher_share": 1.0, "allow_biased": True},
        r"'reverse_kl' on target = 'top_k' is refused: it is infinite",
    ),
    "alpha-beta": (
        {"divergence": "alpha_beta", "allow_biased": True},
        r"'alpha_beta' on target = 'top_k_tail' is refused: it is not an f-divergence",
    ),
    "logits": (
        {"divergence": "logit_mse", "allow_biased": True},
        r"'logit_mse' on target = 'top_k_tail' is refused: it compares logits",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name_value_and_rule(what):
    changes, message = BAD[what]
    assert call().loss.isfinite()
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_weights_without_a_tail_need_not_sum_to_one():
    short = call(**NO_TAIL, allow_biased=True)
    assert short.kd.isfinite().all()


def test_records_of_tokens_with_weight_zero_may_hold_anything_but_bad_ids():
    off = changed(torch.ones(9), 3, 0.0)
    unsound = record(weights=changed(WEIGHTS, 3, float("nan")), log_tail=changed(TAIL, 3, float("nan")))
    head = GOOD.base.head_s.weight.clone().requires_grad_()
    parts = call(**unsound, kd_weight=off, head_s=head)
    parts.loss.backward()
    sound = GOOD.base.head_s.weight.clone().requires_grad_()
    expected = call(kd_weight=off, head_s=sound)
    expected.loss.backward()
    assert torch.equal(parts.loss, expected.loss)
    assert torch.equal(head.grad, sound.grad)


def test_cells_of_the_matrix_have_their_kind_and_reason():
    kinds = {cell: value.kind for cell, value in matrix.MATRIX.items()}
    assert kinds["forward_kl", "sampled"] == "unbiased"
    assert [d for d in reference.DIVERGENCES if kinds[d, "top_k_tail"] == "lower_bound"] == list(matrix.F_DIVERGENCES)
    assert all(kinds[d, "dense"] == "exact" for d in reference.DIVERGENCES)
    assert all(bool(cell.reason) == (cell.kind in ("biased", "refused")) for cell in matrix.MATRIX.values())
    assert matrix.require("jsd", "top_k", allow_biased=True).kind == "biased"
    with pytest.raises(ValueError, match=r"'jsd' on target = 'top_k' is biased"):
        matrix.require("jsd", "top_k")


def test_an_explicit_backend_never_falls_back(monkeypatch):
    cpu = torch.device("cpu")
    assert sparse_dispatch.sparse_kernels("auto", cpu, torch.float64) is sparse_rows
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as where triton runs
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available .* float32 logits, not torch.float64"):
        sparse_dispatch.sparse_kernels("triton", cpu, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend = 'triton' is not available for cpu"):
        sparse_dispatch.sparse_kernels("triton", cpu, torch.float32)
