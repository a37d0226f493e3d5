"""The streamed loss on sparse records in one process: gradients against float64, laws, exactness and bias."""

import itertools
from dataclasses import replace

import pytest
import torch
from kdtrain_kernels.divergences import DIVERGENCES

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import (
    SparseTarget,
    linear_cross_entropy,
    linear_sparse_kd_loss,
    matrix,
    merge_duplicates,
    reference,
    sparse_reference,
    stream,
)
from kdtrain.losses.vocab_group import VocabGroup
from tests.support.loss_cases import VARIANTS, identity_case, random_case, relative_error, streamed_answer
from tests.support.sparse_cases import (
    SCHEMES,
    SparseCase,
    naive_sparse_answer,
    record_of,
    sparse_case,
    streamed_sparse_answer,
)

CELLS = [
    (scheme, name)
    for scheme, name in itertools.product(SCHEMES, matrix.F_DIVERGENCES)
    if matrix.MATRIX[name, "top_k" if scheme == "truncated" else scheme].kind != "refused"
]
GRADIENTS = ("grad_hidden", "grad_weight", "grad_bias")
NORMALISED = [cell for cell in CELLS if cell[0] != "truncated"]


def test_schemes_cover_every_permitted_cell():
    declared = {cell for cell, value in matrix.MATRIX.items() if value.kind in ("unbiased", "lower_bound", "biased")}
    assert {(name, scheme) for scheme, name in CELLS if scheme != "truncated"} == declared


@pytest.mark.parametrize(("scheme", "name"), CELLS)
def test_loss_and_gradients_match_the_reference(scheme, name):
    for vocab, chunk, temperature, properties in [(101, 8, 1.0, True), (1000, 37, 2.0, False), (101, 999, 0.7, True)]:
        for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            case = sparse_case(
                37, vocab, scheme, divergence=name, dtype=dtype, properties=properties, temperature=temperature
            )
            expected = naive_sparse_answer(case)
            got, _ = streamed_sparse_answer(case, chunk=chunk, multiple=128)
            assert relative_error(got.loss, expected.loss) < tolerance / 10
            for which in GRADIENTS[: 3 if properties else 2]:
                error = relative_error(getattr(got, which), getattr(expected, which))
                assert error <= tolerance, (which, vocab, dtype)


@pytest.mark.parametrize(("scheme", "name"), CELLS)
def test_values_per_token_match_the_reference(scheme, name):
    case = sparse_case(37, 101, scheme, divergence=name, dtype=torch.float64, properties=True, temperature=2.0)
    parts = streamed_sparse_answer(case)[0].parts
    base = case.base
    student = reference.head_logits(base.hidden_s, base.head_s, 101)
    kd = sparse_reference.sparse_kd(
        student, case.target, divergence=name, temperature=2.0, renormalise_student=scheme == "conditional"
    )
    ce = reference.cross_entropy(student, base.labels.clamp(min=0)).where(base.labels >= 0, 0.0)
    torch.testing.assert_close(parts.kd, kd, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.ce, ce, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(parts.lse, student.logsumexp(1), rtol=1e-12, atol=1e-12)
    assert not any(field.requires_grad for field in (parts.kd, parts.ce, parts.lse))
    assert (case.target.ids[4] == -1).all()
    assert parts.kd[4].abs() < 1e-12, "a token whose record is empty has no divergence"


@pytest.mark.parametrize(("scheme", "name"), NORMALISED)
@pytest.mark.parametrize("offset", [0.0, 80.0])
def test_rows_of_d_logits_match_to_1e_6_and_sum_to_zero(scheme, name, offset):
    rng = torch.Generator().manual_seed(1)
    student = 3 * torch.randn(37, 101, generator=rng) + offset
    teacher = student + 0.7 * torch.randn(37, 101, generator=rng) - 1.5 * offset
    for temperature in (1.0, 2.0):
        base = random_case(37, 101, divergence=name, temperature=temperature)
        base = replace(base, ce_weight=torch.zeros(37), kd_weight=torch.ones(37))
        settings = {"allow_biased": True, "renormalise_student": scheme == "conditional"}
        case = SparseCase(
            identity_case(student, teacher, base), record_of(teacher, scheme, 12, temperature=temperature), settings
        )
        got = streamed_sparse_answer(case, chunk=8)[0].grad_hidden.double() / temperature
        p = (teacher.double() / temperature).softmax(-1).norm(dim=-1)
        q = (student.double() / temperature).softmax(-1).norm(dim=-1)
        error = (got - naive_sparse_answer(case).grad_hidden / temperature).norm(dim=-1)
        assert (error / (p + q)).max() <= 1e-6
        assert (got.sum(-1).abs() / (p + q)).max() <= 1e-6


@pytest.mark.parametrize("log_tail", [-16.0, -23.0, -60.0])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_tiny_tail_is_accurate_in_float32(name, log_tail):
    """1 - sum q would lose all precision below 1e-7."""
    student = torch.tensor([[12.0, 11.0, log_tail, log_tail - 1.0, log_tail + 0.5]])
    weights = torch.tensor([[0.5, 0.5]])
    record = SparseTarget(torch.tensor([[1, 0]]), weights, torch.tensor([log_tail]), torch.zeros(1), torch.zeros(1))
    base = random_case(1, 5, divergence=name)
    base = replace(identity_case(student, student, base), kd_weight=torch.ones(1), ce_weight=torch.zeros(1))
    case = SparseCase(base, record)
    got, expected = streamed_sparse_answer(case)[0].grad_hidden.double(), naive_sparse_answer(case).grad_hidden
    torch.testing.assert_close(got[:, 2:], expected[:, 2:], rtol=2e-6, atol=0)


def whole_record(logits, temperature):
    """All V ids, in a shuffled order, and an empty tail."""
    p = (logits.double() / temperature).softmax(-1)
    order = torch.rand(p.shape, generator=torch.Generator().manual_seed(3)).argsort(1)
    nothing = torch.full((len(p),), float("-inf"), dtype=torch.float64)
    return SparseTarget(order, p.gather(1, order), nothing, nothing, -(p * p.log()).sum(1))


@pytest.mark.parametrize("name", matrix.F_DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_record_of_the_whole_vocabulary_equals_the_dense_loss(name, temperature):
    base = random_case(37, 101, divergence=name, dtype=torch.float64, properties=True, temperature=temperature)
    teacher = reference.head_logits(base.hidden_t, base.head_t, 101)
    dense, _ = streamed_answer(base)
    got, _ = streamed_sparse_answer(SparseCase(base, whole_record(teacher, temperature)))
    torch.testing.assert_close(got.loss, dense.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.parts.kd, dense.parts.kd, rtol=1e-10, atol=1e-12)
    for which in GRADIENTS:
        torch.testing.assert_close(getattr(got, which), getattr(dense, which), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", matrix.F_DIVERGENCES)
def test_lower_bound_is_below_the_divergence_and_increases_with_the_ids_kept(name):
    base = random_case(37, 101, divergence=name, dtype=torch.float64, temperature=2.0)
    teacher = reference.head_logits(base.hidden_t, base.head_t, 101)
    ids = teacher.argsort(1, descending=True)
    p = (teacher / 2.0).softmax(-1).gather(1, ids)
    values = []
    for width in (1, 4, 30, 100):
        tail = p[:, width:].sum(1).log()
        record = SparseTarget(ids[:, :width], p[:, :width], tail, tail, tail)
        values.append(streamed_sparse_answer(SparseCase(base, record))[0].parts.kd)
    values.append(streamed_answer(base)[0].parts.kd)
    for one, finer in itertools.pairwise(values):
        assert (finer - one).min() >= -1e-12
    assert (values[-1] - values[0]).min() > 1e-3


@pytest.mark.parametrize("name", matrix.F_DIVERGENCES)
def test_record_of_the_student_itself_gives_a_zero_gradient_up_to_rounding(name):
    case = sparse_case(37, 1000, "top_k_tail", divergence=name, dtype=torch.float64, properties=True, temperature=2.0)
    base = replace(case.base, ce_weight=torch.zeros(37), kd_weight=torch.ones(37))
    logits = reference.head_logits(base.hidden_s, base.head_s, 1000)
    rounded = record_of(logits, "top_k_tail", 12, temperature=2.0)  # float32 weights
    got, _ = streamed_sparse_answer(SparseCase(base, rounded))
    other, _ = streamed_sparse_answer(replace(case, base=base))
    assert 0 <= got.parts.kd.min() <= got.parts.kd.max() < 1e-6
    if name == "tvd":  # its slope is a sign, determined by rounding
        return
    assert got.grad_hidden.norm() < 1e-6 * other.grad_hidden.norm()
    p = (logits / 2.0).softmax(-1)
    ids = p.topk(8).indices
    outside = p.scatter(1, ids, 0.0).sum(1).log()
    exact = SparseTarget(ids, p.gather(1, ids), outside, outside, outside)
    got, _ = streamed_sparse_answer(SparseCase(base, exact))
    assert got.parts.kd.max() < 1e-14
    assert got.grad_hidden.norm() < 1e-13 * other.grad_hidden.norm()


def test_sampled_records_give_the_dense_gradient_on_average():
    """E[gradient] over 4000 records of 8 draws against the dense one, in units of its standard error."""
    student, teacher = torch.randn(2, 1, 20, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    copies = 4000
    base = identity_case(student.expand(copies, -1).contiguous(), teacher, random_case(copies, 20, temperature=2.0))
    base = replace(base, kd_weight=torch.ones(copies), ce_weight=torch.zeros(copies))
    record = record_of(teacher.expand(copies, -1), "sampled", 8, temperature=2.0)
    record = replace(record, weights=record.weights.double(), entropy=record.entropy.double())
    got, _ = streamed_sparse_answer(SparseCase(base, record), chunk=500)
    keep = torch.arange(copies) != 4  # its record is empty
    x = student.clone().requires_grad_()
    kd = reference.forward_kl(x, teacher, temperature=2.0)
    (dense,) = torch.autograd.grad(4 * kd.sum(), x)
    for samples, truth in ((got.grad_hidden[keep], dense[0]), (got.parts.kd[keep], kd.detach())):
        error = (samples.mean(0) - truth).abs() / (samples.std(0) / (copies - 1) ** 0.5)
        assert error.max() < 4.5
        assert samples.std(0).min() > 1e-3, "nothing was random"


def test_renormalised_models_have_no_gradient_outside_the_ids():
    case = sparse_case(9, 101, "conditional", dtype=torch.float64, temperature=2.0)
    eye = torch.randn(9, 101, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    base = replace(identity_case(eye, eye, case.base), ce_weight=torch.zeros(9), kd_weight=torch.ones(9))
    grad = streamed_sparse_answer(replace(case, base=base))[0].grad_hidden
    ids = case.target.ids.long()
    inside = torch.zeros(9, 101).scatter_add_(1, ids.clamp(min=0), (ids >= 0).float()) > 0
    assert not grad[~inside].any()
    w = case.target.weights.double() / case.target.weights.double().sum(1, keepdim=True)
    soft = (eye.gather(1, ids.clamp(min=0)) / 2.0).masked_fill(ids < 0, float("-inf")).softmax(1)
    for token in (0, 3, 8):
        slots = ids[token] >= 0
        expected = 2.0 * (soft - w)[token, slots]
        torch.testing.assert_close(grad[token, ids[token, slots]], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_weight_zero_is_cross_entropy_for_any_record(scheme, temperature):
    case = sparse_case(37, 1000, scheme, properties=True, dtype=torch.float64, temperature=temperature)
    nonsense = replace(case.target, weights=torch.full_like(case.target.weights, float("nan")))
    base = replace(case.base, kd_weight=torch.zeros(37))
    got, _ = streamed_sparse_answer(replace(case, base=base, target=nonsense))
    head = replace(base.head_s, weight=base.head_s.weight.clone().requires_grad_())
    hidden = base.hidden_s.clone().requires_grad_()
    shard = VocabShard.of(1000, multiple=1)
    plain = linear_cross_entropy(hidden, head, base.labels, weight=base.ce_weight, shard=shard)
    plain.loss.backward()
    torch.testing.assert_close(got.loss, plain.loss.detach(), rtol=1e-13, atol=0)
    torch.testing.assert_close(got.grad_hidden, hidden.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got.grad_weight, head.weight.grad, rtol=1e-10, atol=1e-13)


def test_kd_and_ce_terms_alone_have_their_own_gradients_with_temperature_squared():
    case = sparse_case(9, 101, "top_k_tail", divergence="jsd", dtype=torch.float64, temperature=3.0)
    x = torch.randn(9, 101, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    kd = sparse_reference.sparse_kd(x, case.target, divergence="jsd", temperature=3.0)
    (kd_grad,) = torch.autograd.grad(kd.sum(), x)
    labels = torch.where(torch.arange(9) % 2 == 0, case.target.ids[:, 1].long().clamp(min=0), torch.arange(9))
    ce_grad = x.detach().softmax(-1) - torch.eye(101, dtype=torch.float64)[labels]
    base = replace(identity_case(x.detach(), x.detach(), case.base), labels=labels)
    for kd_weight, ce_weight, expected in [(1.0, 0.0, 9 * kd_grad), (0.0, 1.0, ce_grad)]:
        weights = {"kd_weight": torch.full((9,), kd_weight), "ce_weight": torch.full((9,), ce_weight)}
        got, _ = streamed_sparse_answer(replace(case, base=replace(base, **weights)))
        torch.testing.assert_close(got.grad_hidden, expected, rtol=1e-10, atol=1e-12)


def test_order_of_slots_and_empty_slots_change_nothing():
    case = sparse_case(37, 101, "top_k_tail", divergence="skew_kl", dtype=torch.float64)
    order = torch.rand(37, 17, generator=torch.Generator().manual_seed(8)).argsort(1)
    ids = torch.nn.functional.pad(case.target.ids, (0, 5), value=-1).gather(1, order)
    weights = torch.nn.functional.pad(case.target.weights, (0, 5)).gather(1, order)
    moved = replace(case, target=replace(case.target, ids=ids, weights=weights))
    got, expected = streamed_sparse_answer(moved)[0], streamed_sparse_answer(case)[0]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(got.grad_hidden, expected.grad_hidden, rtol=1e-11, atol=1e-13)


LIMITS = [
    (name, dict(zip(row.parameters, values, strict=True)), plain)
    for name, row in DIVERGENCES.items()
    for values, plain in row.limits.items()
    if row.f_divergence
]


@pytest.mark.parametrize(("name", "parameters", "plain"), LIMITS)
def test_parameters_at_their_limits_give_the_plain_divergences(name, parameters, plain):
    got = streamed_sparse_answer(sparse_case(9, 101, "top_k_tail", divergence=name, **parameters))[0]
    assert torch.equal(got.loss, streamed_sparse_answer(sparse_case(9, 101, "top_k_tail", divergence=plain))[0].loss)


SPARSE_VARIANTS = [variant for variant in VARIANTS if variant[0] in matrix.F_DIVERGENCES]


@pytest.mark.parametrize(("name", "parameters"), SPARSE_VARIANTS)
def test_loss_on_a_record_has_the_parameters_of_the_divergence(name, parameters):
    case = sparse_case(9, 101, "top_k_tail", divergence=name, dtype=torch.float64, **parameters)
    expected, got = naive_sparse_answer(case), streamed_sparse_answer(case)[0]
    assert relative_error(got.loss, expected.loss) < 1e-12
    assert relative_error(got.grad_hidden, expected.grad_hidden) < 1e-10


def test_gradients_with_tied_heads_and_with_a_frozen_trunk():
    case = sparse_case(9, 101, "top_k_tail", dtype=torch.float64)
    shard = VocabShard.of(101, multiple=1)
    weight = case.base.head_s.weight.clone().requires_grad_()
    tokens = torch.arange(9) * 7
    shared = {
        "kd_weight": case.base.kd_weight,
        "ce_weight": case.base.ce_weight,
        "shard": shard,
        "slab_bytes": 8 * 2048 * 3,
    }
    linear_sparse_kd_loss(weight[tokens], weight, case.target, case.base.labels, **shared).loss.backward()
    naive = case.base.head_s.weight.clone().requires_grad_()
    sparse_reference.sparse_total_loss(
        naive[tokens] @ naive.T,
        case.target,
        case.base.labels,
        temperature=1.0,
        kd_weight=case.base.kd_weight,
        ce_weight=case.base.ce_weight,
    ).backward()
    torch.testing.assert_close(weight.grad, naive.grad, rtol=1e-10, atol=1e-12)

    head = case.base.head_s.weight.clone().requires_grad_()
    linear_sparse_kd_loss(case.base.hidden_s, head, case.target, case.base.labels, **shared).loss.backward()
    assert relative_error(head.grad, naive_sparse_answer(case).grad_weight) < 1e-10


def test_z_loss_and_main_grad_work_as_in_the_dense_loss():
    case = sparse_case(37, 101, "top_k_tail", dtype=torch.float64, properties=True, temperature=2.0)
    z_weight = torch.rand(37, generator=torch.Generator().manual_seed(4)) * 0.1
    got, _ = streamed_sparse_answer(case, z_weight=z_weight)
    plain, _ = streamed_sparse_answer(case)
    hidden = case.base.hidden_s.clone().requires_grad_()
    z_loss = (z_weight.double() * reference.head_logits(hidden, case.base.head_s, 101).logsumexp(1).square()).sum()
    z_loss.backward()
    torch.testing.assert_close(got.loss, plain.loss + z_loss.detach())
    torch.testing.assert_close(got.grad_hidden, plain.grad_hidden + hidden.grad, rtol=1e-9, atol=1e-11)

    base, buffer = case.base, torch.ones(101, 16, dtype=torch.float64)
    head = replace(base.head_s, weight=base.head_s.weight.clone().requires_grad_())
    linear_sparse_kd_loss(
        base.hidden_s,
        head,
        case.target,
        base.labels,
        temperature=2.0,
        kd_weight=base.kd_weight,
        ce_weight=base.ce_weight,
        shard=VocabShard.of(101, multiple=1),
        main_grad=buffer,
    ).loss.backward()
    assert head.weight.grad is None
    torch.testing.assert_close(buffer - 1.0, plain.grad_weight, rtol=1e-9, atol=1e-11)


def test_bfloat16_error_is_one_rounding_of_the_gradient():
    for scheme, name in (("top_k_tail", "reverse_kl"), ("sampled", "forward_kl"), ("conditional", "jsd")):
        case = sparse_case(37, 1000, scheme, divergence=name, dtype=torch.bfloat16, widths=(64, 64))
        expected, (got, _) = naive_sparse_answer(case), streamed_sparse_answer(case)
        assert got.loss.dtype == torch.float32
        assert relative_error(got.loss, expected.loss) < 2e-6
        for which in ("grad_hidden", "grad_weight"):
            assert getattr(got, which).dtype == torch.bfloat16
            assert relative_error(getattr(got, which), getattr(expected, which)) < 2**-9


def test_ids_masked_by_an_infinite_bias_change_nothing():
    case = sparse_case(11, 101, "top_k_tail", divergence="jsd", dtype=torch.float64, temperature=2.0)
    weights = case.base.head_s.weight
    bias = torch.zeros(101, dtype=torch.float64)
    bias[90:] = float("-inf")
    base = replace(case.base, labels=case.base.labels.clamp(max=89), head_s=HeadShard(weights, bias))
    short = replace(base, head_s=HeadShard(weights[:90]))
    inside = replace(case.target, ids=case.target.ids.where(case.target.ids < 90, -1))
    tail = (1 - inside.weights.where(inside.ids >= 0, 0.0).double().sum(1)).log()
    inside = replace(inside, weights=inside.weights.where(inside.ids >= 0, 0.0), log_tail=tail)
    got = streamed_sparse_answer(replace(case, base=base, target=inside))[0]
    expected = streamed_sparse_answer(replace(case, base=short, target=inside))[0]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad_hidden, expected.grad_hidden, rtol=1e-10, atol=1e-13)
    assert not got.grad_weight[90:].any()
    kept = streamed_sparse_answer(replace(case, base=base))[0]  # masked ids inside the record too
    assert kept.grad_hidden.isfinite().all()


def test_no_grad_gives_the_same_bits_and_empty_batches_work():
    case = sparse_case(19, 101, "top_k_tail", divergence="jsd", temperature=2.0)
    with_grad = streamed_sparse_answer(case)[0].parts
    base, shard = case.base, VocabShard.of(101, multiple=1)
    shared = {"divergence": "jsd", "temperature": 2.0, "shard": shard}
    with torch.no_grad():
        parts = linear_sparse_kd_loss(
            base.hidden_s.clone().requires_grad_(),
            base.head_s,
            case.target,
            base.labels,
            kd_weight=base.kd_weight,
            ce_weight=base.ce_weight,
            slab_bytes=stream.bytes_per_token(VocabGroup(shard, None), torch.float32) * 8,
            **shared,
        )
    assert not parts.loss.requires_grad
    assert torch.equal(parts.loss, with_grad.loss.detach())
    assert torch.equal(parts.kd, with_grad.kd)
    nothing = SparseTarget(*(getattr(case.target, f)[:0] for f in ("ids", "weights", "log_tail", "entropy", "entropy")))
    empty = torch.zeros(0)
    parts = linear_sparse_kd_loss(
        base.hidden_s[:0], base.head_s, nothing, base.labels[:0], kd_weight=empty, ce_weight=empty, **shared
    )
    assert float(parts.loss) == 0.0


def test_draws_of_the_same_id_are_merged_and_their_weights_added():
    ids = torch.tensor([[5, 2, 5, -1, 2, 5], [-1, -1, -1, -1, -1, -1], [4, 3, 2, 1, 0, 9]], dtype=torch.int32)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.25, 0.15], [0.0] * 6, [0.5, 0.1, 0.1, 0.1, 0.1, 0.1]])
    kept, summed = merge_duplicates(ids, weights)
    assert kept.dtype == torch.int32
    assert kept.tolist() == [[-1, 2, 5, -1, -1, -1], [-1] * 6, [0, 1, 2, 3, 4, 9]]
    expected = torch.tensor([[0.0, 0.45, 0.55, 0.0, 0.0, 0.0], [0.0] * 6, [0.1, 0.1, 0.1, 0.1, 0.5, 0.1]])
    torch.testing.assert_close(summed, expected)
    with pytest.raises(ValueError, match=r"ids have shape \(3, 6\), weights \(3, 5\)"):
        merge_duplicates(ids, weights[:, :5])
