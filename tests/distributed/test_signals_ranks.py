"""One function takes every signal to its loss: value and gradients equal float64 autograd in every layout."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from kdtrain.batch import Batch
from kdtrain.distributed.collectives import gather_ranks, reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import divergence_spec, reference
from kdtrain.losses.sparse_targets import target_kind
from kdtrain.teacher.resharding import TeacherResharding
from kdtrain.teacher.signal import DenseSignal, HeadLayout, SparseSignal
from kdtrain.teacher.signal_loss import LossWeights, signal_loss
from kdtrain.teacher.signal_measures import kl_sum, nll_sums
from tests.support.loss_cases import answer_of, cut_head, naive_answer, random_case, relative_error
from tests.support.sparse_cases import SCHEMES, naive_sparse_answer, sparse_case

pytestmark = pytest.mark.dist

TOKENS, VOCAB, TOLERANCE = 30, 101, 1e-5


def batch_of(labels, mask=None):
    """The labels [T] as three sequences; a loss needs nothing else of a batch."""
    rows = labels.reshape(3, -1)
    mask = torch.ones(rows.shape) if mask is None else mask.reshape(rows.shape)
    return Batch(rows, rows, mask, rows, torch.arange(3))


def layout_of(mesh):
    shard = VocabShard.of(VOCAB, mesh.tp_rank, mesh.tp_size, multiple=2)
    return HeadLayout(shard, mesh.tp_group, 16 * shard.rows * 8)  # several chunks of tokens


def answer(base, signal, layout):
    """The answer of signal_loss for the student, labels and weights of a LossCase; the head's gradients as stored."""
    head, hidden = cut_head(base.head_s, layout.shard), base.hidden_s.clone().requires_grad_()
    weights = LossWeights(base.kd_weight, base.ce_weight)
    spec = divergence_spec(base.divergence, **base.parameters)
    parts = signal_loss(hidden, head, signal, batch_of(base.labels), weights, spec, layout)
    return answer_of(parts.loss, hidden, head, layout.shard, parts)


def assert_agrees(got, want, shard):
    mine = slice(shard.start, shard.start + shard.valid_rows)
    assert relative_error(got.loss, want.loss) <= TOLERANCE
    assert relative_error(got.grad_hidden, want.grad_hidden) <= TOLERANCE
    error = (got.grad_weight.double() - want.grad_weight[mine]).norm() / want.grad_weight.norm()
    assert error <= TOLERANCE


def check_sparse(rank, world_size, scheme):
    mesh = Mesh.build(world_size)
    for temperature in (1.0, 2.0):
        case = sparse_case(TOKENS, VOCAB, scheme, temperature=temperature)
        layout = layout_of(mesh)
        kind = target_kind(case.target, scheme == "conditional")
        got = answer(case.base, SparseSignal(case.target, kind, temperature, allow_biased=True), layout)
        assert_agrees(got, naive_sparse_answer(case), layout.shard)


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sparse_signal_gives_the_loss_and_gradients_of_its_record(rank_pool, world_size, scheme):
    rank_pool(world_size).run(check_sparse, scheme=scheme)


def check_dense(rank, world_size):
    mesh = Mesh.build(world_size)
    for divergence, parameters in (("forward_kl", {"temperature": 2.0}), ("jsd", {"teacher_share": 0.3})):
        base = random_case(TOKENS, VOCAB, divergence=divergence, **parameters)
        layout = layout_of(mesh)
        teacher = cut_head(base.head_t, layout.shard)
        signal = DenseSignal(base.hidden_t, replace(teacher, weight=teacher.weight.detach()))
        assert_agrees(answer(base, signal, layout), naive_answer(base), layout.shard)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_dense_signal_gives_the_loss_and_gradients_of_whole_distributions(rank_pool, world_size):
    rank_pool(world_size).run(check_dense)


def sides_of(base):
    """Hidden states and head of the student and of the teacher."""
    return (base.hidden_s, base.head_s), (base.hidden_t, base.head_t)


def shared_signal(student_mesh, base, layout):
    """The signal of a teacher that the replicas share, which has run the tokens of all of them."""
    sharing = TeacherResharding.of(student_mesh, Mesh.build(2), layout.shard)
    teacher = cut_head(base.head_t, sharing.shard)
    head = replace(teacher, weight=teacher.weight.detach())
    return DenseSignal(gather_ranks(base.hidden_t, dist.group.WORLD).flatten(0, 1), head, sharing)


def check_shared(rank, world_size):
    student_mesh = Mesh.build(1)
    base = random_case(TOKENS, VOCAB, temperature=2.0, seed=rank)
    whole = random_case(TOKENS, VOCAB, temperature=2.0)
    base = replace(base, head_s=whole.head_s, head_t=whole.head_t)  # one model, tokens of their own
    layout = layout_of(student_mesh)
    got, want = answer(base, shared_signal(student_mesh, base, layout), layout), naive_answer(base)
    assert relative_error(got.grad_hidden, want.grad_hidden) <= TOLERANCE
    # a replica has a part of the loss and of the head's gradient, which ZeRO adds up
    for mine, whole_of_mine in ((got.loss, want.loss), (got.grad_weight, want.grad_weight)):
        assert relative_error(sum_over_ranks(mine), sum_over_ranks(whole_of_mine)) <= TOLERANCE
    kd = reference.forward_kl(*(reference.head_logits(*side, VOCAB) for side in sides_of(base)), temperature=2.0)
    torch.testing.assert_close(got.parts.kd.double(), kd, rtol=1e-5, atol=1e-5)


def sum_over_ranks(values):
    return reduce_sum_(values.detach().double().clone(), dist.group.WORLD)


def test_replicas_that_share_a_teacher_add_up_to_the_loss_and_gradients_of_all_tokens(rank_pool):
    rank_pool(2).run(check_shared)


def check_measures(rank, world_size, shared):
    mesh = Mesh.build(1 if shared else world_size)
    base = random_case(TOKENS, VOCAB, seed=rank if shared else 0)
    whole = random_case(TOKENS, VOCAB)
    base = replace(base, head_t=whole.head_t)
    layout = layout_of(mesh)
    if shared:
        signal = shared_signal(mesh, base, layout)
    else:
        teacher = cut_head(base.head_t, layout.shard)
        signal = DenseSignal(base.hidden_t, replace(teacher, weight=teacher.weight.detach()))
    other = replace(signal, hidden_states=signal.hidden_states * 1.1)
    logits = reference.head_logits(base.hidden_t, base.head_t, VOCAB)
    others = reference.head_logits(base.hidden_t * 1.1, base.head_t, VOCAB)
    mask, sets = torch.arange(TOKENS).fmod(3).float().clamp(max=1), [base.labels.clamp(min=0), torch.arange(TOKENS)]
    batch = batch_of(sets[0], mask)
    found = nll_sums(signal, [labels.reshape(3, -1) for labels in sets], batch.loss_mask, layout)
    for nll, labels in zip(found, sets, strict=True):
        want = (reference.cross_entropy(logits, labels) * mask).sum()
        if shared:
            nll, want = sum_over_ranks(nll), sum_over_ranks(want)
        assert relative_error(nll, want) <= TOLERANCE
    kl = (reference.forward_kl(others, logits) * mask).sum()
    assert relative_error(kl_sum(signal, other, batch, layout), kl) <= 1e-4
    assert kl > 1e-2


@pytest.mark.parametrize(("world_size", "shared"), [(1, False), (2, False), (2, True)])
def test_measures_of_dense_signals_equal_their_definitions(rank_pool, world_size, shared):
    rank_pool(world_size).run(check_measures, shared=shared)
