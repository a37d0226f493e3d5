"""Streamed losses over ranks, properties that need several ranks: merged shards, subgroups, ties, measuring."""

import dataclasses
import itertools
from dataclasses import replace

import pytest
import torch

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy, linear_kd_loss, reference
from tests.support.loss_cases import (
    Answer,
    cut_head,
    identity_case,
    naive_answer,
    random_case,
    relative_error,
    streamed_answer,
)

pytestmark = pytest.mark.dist

ALL = sorted(reference.DIVERGENCES)
GRADIENTS = ("grad_hidden", "grad_weight", "grad_bias")
# divergence, vocabulary, temperature, bias + scale + soft-cap: 5003 is prime, 101 leaves ranks with padding only
PROBLEMS = [
    (name, vocab, temperature, properties)
    for name, (vocab, temperature, properties) in itertools.product(ALL, [(5003, 1.0, True), (101, 2.0, False)])
]


def make(problem, dtype=torch.float32):
    name, vocab, temperature, properties = problem
    return random_case(37, vocab, divergence=name, temperature=temperature, properties=properties, dtype=dtype)


def run_problems(rank, world_size, *, problems, tp, dtype):
    """This rank's loss and gradients of each problem, within its tensor-parallel group."""
    group = Mesh.build(tp).tp_group
    found = []
    for number, problem in enumerate(problems):
        answer, _ = streamed_answer(make(problem, dtype), group=group, multiple=128, chunk=(8, 37)[number % 2])
        found.append([getattr(answer, name) for name in ("loss", *GRADIENTS)])
    return found


def merged(of_ranks):
    """Ranks' answers to one problem -> the whole Answer; loss and d(hidden) must be the same bits on all ranks."""
    for other in of_ranks[1:]:
        assert torch.equal(other[0], of_ranks[0][0])
        assert torch.equal(other[1], of_ranks[0][1])
    weight, bias = (
        None if of_ranks[0][place] is None else torch.cat([answer[place] for answer in of_ranks]) for place in (2, 3)
    )
    return Answer(of_ranks[0][0], of_ranks[0][1], weight, bias)


def assert_within(got, expected, limit_of):
    """Every gradient's relative error within limit_of(name)."""
    for name in GRADIENTS:
        if getattr(expected, name) is not None:
            error = relative_error(getattr(got, name), getattr(expected, name))
            assert error <= limit_of(name), f"{name}: {error}"


@pytest.mark.parametrize("tp", [2, 4])
def test_merged_float32_gradient_error_is_at_most_three_times_the_naive_formulas(rank_pool, tp):
    answers = rank_pool(tp).run(run_problems, problems=PROBLEMS, tp=tp, dtype=torch.float32)
    for problem, *of_ranks in zip(PROBLEMS, *answers, strict=True):
        case = make(problem)
        logits = [
            reference.head_logits(hidden, head, problem[1])
            for hidden, head in ((case.hidden_s, case.head_s), (case.hidden_t, case.head_t))
        ]
        kl = reference.forward_kl(*logits, temperature=problem[2])
        assert 0.1 <= kl.mean() <= 5, "the range the criterion is stated for"
        expected, naive = naive_answer(case), naive_answer(case, torch.float32)

        def limit(name, expected=expected, naive=naive):
            return min(1e-5, 3 * relative_error(getattr(naive, name), getattr(expected, name)) + 1e-6)

        assert_within(merged(of_ranks), expected, limit)


def test_comparison_detects_a_gradient_off_by_a_factor_of_tp(rank_pool):
    problem = PROBLEMS[0]
    expected = naive_answer(make(problem))
    answers = rank_pool(2).run(run_problems, problems=[problem], tp=2, dtype=torch.float32)
    got = merged([answer[0] for answer in answers])
    assert_within(got, expected, lambda name: 1e-5)
    for name, factor in itertools.product(GRADIENTS, (0.5, 2.0)):
        wrong = dataclasses.replace(got, **{name: getattr(got, name) * factor})
        with pytest.raises(AssertionError, match=name):
            assert_within(wrong, expected, lambda name: 0.4)


def test_two_replicas_of_tp_2_match_one(rank_pool):
    problems = [problem for problem in PROBLEMS if problem[0] in ("forward_kl", "jsd")]
    two = rank_pool(2).run(run_problems, problems=problems, tp=2, dtype=torch.float32)
    four = rank_pool(4).run(run_problems, problems=problems, tp=2, dtype=torch.float32)
    for rank, answers in enumerate(four):
        for of_four, of_two in zip(answers, two[rank % 2], strict=True):
            for a, b in zip(of_four, of_two, strict=True):
                assert a is b is None or torch.equal(a, b)


def run_offsets(rank, world_size, *, offsets):
    """Rows of d(logits) where the models' logits lie far apart: error, and sum over all ranks' columns."""
    group = Mesh.build(world_size).tp_group
    rng = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(2, 19, 101, generator=rng) * 2).unbind(0)
    for name, temperature in itertools.product(ALL, (1.0, 2.0)):
        base = random_case(19, 101, divergence=name, temperature=temperature)
        base = dataclasses.replace(base, kd_weight=torch.ones(19), ce_weight=torch.zeros(19))
        case = identity_case(student + offsets[0], teacher + offsets[1], base)
        got = streamed_answer(case, group=group)[0].grad_hidden.double()
        size = sum((x.double() / temperature).softmax(1).norm(dim=1) for x in (case.hidden_s, case.hidden_t))
        error = (got - naive_answer(case).grad_hidden).norm(dim=1)
        assert (error <= 1e-6 * temperature * size).all(), (name, temperature)
        assert got.sum(1).abs().max() <= 1e-6 * temperature * 2, f"{name}: p and q sum to 1 each"


@pytest.mark.parametrize("tp", [2, 4])
def test_rows_of_d_logits_over_ranks_are_accurate_with_logits_offset_by_80_and_minus_60(rank_pool, tp):
    rank_pool(tp).run(run_offsets, offsets=(80.0, -60.0))


def run_measured(rank, world_size):
    """Loss and gradients with and without measuring are the same bits."""
    group = Mesh.build(world_size).tp_group
    for problem in PROBLEMS:
        measured, plain = (
            streamed_answer(make(problem), group=group, multiple=128, measure=measure)[0] for measure in (True, False)
        )
        assert measured.parts.tvd is not None
        assert plain.parts.tvd is None
        for name in ("loss", *GRADIENTS):
            a, b = getattr(measured, name), getattr(plain, name)
            assert a is b is None or torch.equal(a, b), (problem, name)
        for name in ("kd", "ce", "teacher_ce"):
            assert torch.equal(getattr(measured.parts, name), getattr(plain.parts, name)), (problem, name)


@pytest.mark.parametrize("tp", [1, 2])
def test_measuring_changes_no_bit_of_loss_and_gradients(rank_pool, tp):
    rank_pool(tp).run(run_measured)


def run_ties(rank, world_size, *, student, teacher):
    """agreement per token for logits given as hidden states of identity heads."""
    student, teacher = torch.tensor(student), torch.tensor(teacher)
    case = identity_case(student, teacher, random_case(len(student), student.shape[1]))
    case = dataclasses.replace(case, ce_weight=torch.zeros(len(student)))
    answer, _ = streamed_answer(case, group=Mesh.build(world_size).tp_group, measure=True)
    return answer.parts.agreement.tolist()


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_agreement_breaks_ties_by_the_smallest_id_over_all_ranks(rank_pool, tp):
    """Seven ids: tp 2 holds 4 + 3 of them and tp 4 holds 2 + 2 + 2 + 1, so ties lie within ranks and across them."""
    ends, neighbours, flat = [5.0, 0, 0, 0, 0, 0, 5.0], [0.0, 5, 5, 0, 0, 0, 0], [0.0] * 7
    id_0, id_1, id_2, id_6 = ([float(id_ == place) for place in range(7)] for id_ in (0, 1, 2, 6))
    pairs = [
        (ends, id_0, 1.0),
        (ends, id_6, 0.0),
        (id_6, ends, 0.0),
        (neighbours, id_1, 1.0),
        (neighbours, id_2, 0.0),
        (flat, id_0, 1.0),
        (id_0, flat, 1.0),
        (flat, ends, 1.0),
        (id_6, flat, 0.0),
    ]
    students, teachers, agreement = (list(column) for column in zip(*pairs, strict=True))
    assert rank_pool(tp).run(run_ties, student=students, teacher=teachers) == [agreement] * tp


def run_refusal(rank, world_size):
    """Rank 0 makes a call that is refused; then all ranks make a good one, which would hang had it communicated."""
    group = Mesh.build(world_size).tp_group
    case = make(PROBLEMS[0])
    if rank == 0:
        bad = dataclasses.replace(case, parameters={"temperature": 0.0})
        with pytest.raises(ValueError, match=r"temperature = 0\.0"):
            streamed_answer(bad, group=group)
    return float(streamed_answer(case, group=group)[0].loss)


def test_refused_call_does_not_communicate(rank_pool):
    losses = rank_pool(2).run(run_refusal)
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(float(naive_answer(make(PROBLEMS[0])).loss), rel=2e-6)


def run_extras(rank, world_size):
    """z-loss and main_grad over ranks, float64 (relative errors); bfloat16 over ranks; a teacher that masks an id."""
    group = Mesh.build(world_size).tp_group
    found = {}
    case = random_case(37, 101, divergence="jsd", dtype=torch.float64, temperature=2.0, properties=True)
    shard = VocabShard.of(101, rank, world_size)
    z_weight = torch.linspace(0.0, 0.1, 37)
    for op in ("kd", "ce"):
        hidden, head = case.hidden_s.clone().requires_grad_(), cut_head(case.head_s, shard)
        main_grad = torch.zeros_like(head.weight)
        shared = {"shard": shard, "group": group, "z_weight": z_weight, "main_grad": main_grad}
        if op == "kd":
            head_t = cut_head(case.head_t, shard)
            loss = linear_kd_loss(
                hidden,
                head,
                case.hidden_t,
                head_t,
                case.labels,
                divergence="jsd",
                kd_weight=case.kd_weight,
                ce_weight=case.ce_weight,
                temperature=2.0,
                **shared,
            ).loss
        else:
            loss = linear_cross_entropy(hidden, head, case.labels, weight=case.ce_weight, **shared).loss
        loss.backward()
        whole = replace(case, kd_weight=case.kd_weight * (op == "kd"))
        x, weight = case.hidden_s.clone().requires_grad_(), case.head_s.weight.clone().requires_grad_()
        s = reference.head_logits(x, replace(case.head_s, weight=weight), 101)
        t = reference.head_logits(case.hidden_t, case.head_t, 101)
        right = reference.total_loss(
            s, t, case.labels, divergence="jsd", temperature=2.0, kd_weight=whole.kd_weight, ce_weight=case.ce_weight
        )
        right = right + (z_weight.double() * s.logsumexp(-1).square()).sum()
        right.backward()
        rows = slice(shard.start, shard.start + shard.valid_rows)
        found[op] = [
            relative_error(loss.detach(), right.detach()),
            relative_error(hidden.grad, x.grad),
            float((main_grad[: shard.valid_rows] - weight.grad[rows]).norm() / weight.grad.norm()),
        ]
    half = random_case(37, 101, divergence="reverse_kl", dtype=torch.bfloat16, widths=(64, 64))
    got, right = streamed_answer(half, group=group, multiple=128)[0], naive_answer(half)
    found["bfloat16"] = relative_error(got.grad_hidden, right.grad_hidden)
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_z_loss_main_grad_and_bfloat16_over_ranks(rank_pool, tp):
    for found in rank_pool(tp).run(run_extras):
        assert max(found["kd"]) <= 1e-10
        assert max(found["ce"]) <= 1e-10
        assert found["bfloat16"] <= 2**-9


def run_masked(rank, world_size):
    """Row sums of d(logits) and the difference to one rank, where the teacher alone masks an id of a quiet shard."""
    group = Mesh.build(world_size).tp_group
    case = random_case(9, 101, dtype=torch.float64)
    rng = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 9, 101, generator=rng, dtype=torch.float64).unbind(0)
    teacher[:, :50] += 30.0  # the other shard's largest logit lies far below the row's
    bias = torch.zeros(101, dtype=torch.float64)
    bias[77] = float("-inf")
    found = {}
    for name in ALL:
        masked = replace(identity_case(student, teacher, replace(case, divergence=name)), ce_weight=torch.zeros(9))
        masked = replace(masked, head_t=replace(masked.head_t, bias=bias))
        got = streamed_answer(masked, group=group)[0].grad_hidden
        alone = streamed_answer(masked)[0].grad_hidden
        found[name] = (float(got.sum(1).abs().max()), relative_error(got, alone))
    return found


@pytest.mark.parametrize("tp", [2, 4])
def test_id_masked_by_the_teacher_alone_gives_the_same_result_in_every_layout(rank_pool, tp):
    for found in rank_pool(tp).run(run_masked):
        for name, (row_sum, error) in found.items():
            assert row_sum <= (1e-9 if name != "logit_mse" else 1e-6), name
            assert error <= 1e-10, name


def run_wrong_group(rank, world_size):
    """Messages when a shard is not this rank's slice of a vocabulary cut over the group."""
    group = Mesh.build(world_size).tp_group
    case, messages = random_case(9, 101), []
    for shard, used in (
        (VocabShard.of(101), group),
        (VocabShard.of(101, rank, world_size), None),
        (VocabShard.of(101, (rank + 1) % world_size, world_size), group),
    ):
        try:
            linear_cross_entropy(
                case.hidden_s, cut_head(case.head_s, shard), case.labels, weight=case.ce_weight, shard=shard, group=used
            )
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_shard_of_another_rank_or_group_is_refused(rank_pool):
    for rank, messages in enumerate(rank_pool(2).run(run_wrong_group)):
        assert messages[0].startswith(f"shard is slice 0 of 1, but this is rank {rank} of a group of 2")
        assert messages[1].startswith(f"shard is slice {rank} of 2, but this is rank 0 of a group of 1")
        assert messages[2].startswith(f"shard is slice {1 - rank} of 2, but this is rank {rank} of a group of 2")
