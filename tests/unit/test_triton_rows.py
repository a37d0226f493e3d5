"""The triton row kernels in triton's interpreter against `torch_rows`, and whole losses against float64.

A separate pool of two ranks runs the checks, because TRITON_INTERPRET must be set before triton is imported. Each rank
runs half of the cases; the loss at tp 2 runs all of them on both.
"""

import ctypes
import importlib.util
import mmap
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from kdtrain_kernels import blocks, divergence_spec, row_kernels, torch_rows
from kdtrain_kernels.blocks import Scratch, front_of_rows
from kdtrain_kernels.dispatch import TRITON_DIVERGENCES
from kdtrain_kernels.torch_rows import LogitMap, RowWeights, merge_pair_stats

from kdtrain.losses import linear_cross_entropy, stream
from kdtrain.testing.ranks import RankPool
from tests.support.loss_cases import (
    VARIANTS,
    naive_answer,
    random_case,
    reference_fields,
    relative_error,
    streamed_answer,
)
from tests.support.row_cases import (
    assert_rows_close,
    labels_of,
    logits_of,
    slab_of,
    truncated_to_bfloat16,
    weights_of,
)

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

TRITON_VARIANTS = [
    (name, given) for name, given in VARIANTS if divergence_spec(name, **given).kernel == name in TRITON_DIVERGENCES
]
MAPS = [LogitMap(), LogitMap(0.8, 9.0), LogitMap(1.5, None)]
COLUMNS = (0, 1, 101, 200)
VOCABULARY = 300
"""Tokens of the whole vocabulary, of which a slab has some."""
BLOCK = 128


@pytest.fixture(scope="module")
def interpreters():
    pool = RankPool(2, {"TRITON_INTERPRET": "1"}, fresh=True)
    yield pool
    pool.close()


def _triton_rows():
    """The kernels with small blocks, so that 200 columns need two blocks, the last one partial."""
    rows = row_kernels("triton", torch.device("cpu"))
    for name in rows.LAUNCHES:
        rows.LAUNCHES[name] = rows.Launch(BLOCK, 1)
    return rows


def _totals(twin, student, teacher, labels, spec):
    """The totals over all ranks, computed by `twin`."""
    scratch = Scratch.of(student)
    stats = twin.pair_stats(student, teacher, labels, spec=spec, scratch=scratch)
    totals = merge_pair_stats(stats[None], spec, VOCABULARY)
    if spec.row.two_rounds:
        parts = twin.pair_round2(student, slab_of(teacher), totals, spec=spec, scratch=scratch)
        totals = replace(totals, z=parts[:, 0])
    return totals


def _compare_pair(rows, spec, columns, logit_map, masked):
    student, teacher = logits_of(columns, masked=masked, cap=logit_map.softcap)
    labels = labels_of(columns)
    settings = {"spec": spec, "scratch": Scratch.of(slab_of(student))}
    totals = _totals(torch_rows, slab_of(student), slab_of(teacher), labels, spec)
    answers = []
    for twin in (torch_rows, rows):
        slabs = slab_of(student), slab_of(teacher)
        first = twin.pair_round2 if spec.row.two_rounds else twin.pair_value
        parts = first(*slabs, totals, **settings)
        value, operand = twin.pair_grad(
            *slabs,
            totals,
            weights_of(labels),
            **settings,
            logit_map=logit_map,
            operand_dtype=torch.float32,
        )
        assert operand.data_ptr() == slabs[0].data_ptr()
        answers.append((parts, value, operand))
    for got, expected in zip(answers[1], answers[0], strict=True):
        assert_rows_close(got, expected, 5e-6, floor=0.1)


def _check_divergences(rank, world_size):
    rows = _triton_rows()
    done = 0
    for index, (name, parameters) in enumerate(TRITON_VARIANTS):
        if index % world_size != rank:
            continue
        at = {t: divergence_spec(name, temperature=t, **parameters) for t in (0.7, 1.0, 2.0)}
        _compare_pair(rows, at[1.0], 200, MAPS[0], True)
        _compare_pair(rows, at[2.0], 101, MAPS[1], False)
        _compare_pair(rows, at[0.7], 20, MAPS[2], True)
        _compare_pair(rows, at[1.0], index % 2, MAPS[0], False)
        done += 1
    return done


def test_sums_and_gradients_of_every_divergence_match_torch_rows(interpreters):
    assert sum(interpreters.run(_check_divergences)) == len(TRITON_VARIANTS)


def _check_stats(rank, world_size):
    rows = _triton_rows()
    for columns in COLUMNS[rank::world_size]:
        for name, temperature, masked in [("reverse_kl", 1.0, True), ("reverse_kl", 2.0, True), ("jsd", 2.0, False)]:
            student, teacher = map(slab_of, logits_of(columns, masked=masked))
            if columns > 1:
                student[4] = -torch.inf  # a row without any unmasked column on this rank
            settings = {"spec": divergence_spec(name, temperature=temperature), "scratch": Scratch.of(student)}
            args = student, teacher, labels_of(columns)
            got, expected = rows.pair_stats(*args, **settings), torch_rows.pair_stats(*args, **settings)
            for column in range(torch_rows.PAIR_STATS):
                assert_rows_close(got[:, column : column + 1], expected[:, column : column + 1])
            one = student, labels_of(columns), temperature, settings["scratch"]
            assert torch.equal(rows.row_stats(*one), got[:, : torch_rows.ROW_STATS])
            expected = torch_rows.first_argmax(student, settings["scratch"])
            assert torch.equal(rows.first_argmax(student, settings["scratch"]), expected)
    tied = slab_of(torch.zeros(3, 200))
    tied[1, 150], tied[1, 70], tied[2, 130:] = 2.0, 2.0, 1.0
    assert rows.first_argmax(tied, Scratch.of(tied))[:, 1].tolist() == [0.0, 70.0, 130.0]


def test_statistics_match_torch_rows_with_masked_and_missing_columns_and_ties(interpreters):
    interpreters.run(_check_stats)


def _check_measure(rank, world_size):
    rows = _triton_rows()
    for columns, temperature in [(101, 1.0), (101, 2.0), (1, 2.0), (0, 1.0)][rank::world_size]:
        student, teacher = map(slab_of, logits_of(columns, masked=True))
        spec = divergence_spec("forward_kl", temperature=temperature)
        totals = _totals(torch_rows, student, teacher, labels_of(columns), spec)
        answers = [
            twin.pair_measure(student, teacher, totals, temperature, scratch=Scratch.of(student))
            for twin in (rows, torch_rows)
        ]
        for column in range(4):
            assert_rows_close(*(answer[:, column : column + 1] for answer in answers))


def test_measured_sums_match_torch_rows(interpreters):
    interpreters.run(_check_measure)


def _check_row_grad(rank, world_size):
    rows = _triton_rows()
    for columns in COLUMNS[rank::world_size]:
        for logit_map in MAPS:
            student = logits_of(columns, masked=logit_map.softcap is None, cap=logit_map.softcap)[0]
            totals = torch_rows.merge_stats(
                torch_rows.row_stats(slab_of(student), labels_of(columns), 1.0, Scratch.of(slab_of(student)))[None], 1.0
            )
            answers = []
            for twin, dtype in [(torch_rows, torch.float32), (rows, torch.float32), (rows, torch.bfloat16)]:
                slab = slab_of(student)
                operand = twin.row_grad(
                    slab,
                    totals,
                    weights_of(labels_of(columns)),
                    logit_map=logit_map,
                    scratch=Scratch.of(slab),
                    operand_dtype=dtype,
                )
                assert operand.dtype == dtype
                assert operand.data_ptr() == slab.data_ptr()
                answers.append(operand)
            assert_rows_close(answers[1], answers[0])
            assert torch.equal(answers[2], truncated_to_bfloat16(answers[1]))


def test_cross_entropy_gradient_matches_torch_rows_and_is_rounded_in_place(interpreters):
    interpreters.run(_check_row_grad)


def _check_bfloat16_pair(rank, world_size):
    rows = _triton_rows()
    for name, temperature in [("forward_kl", 1.0), ("reverse_kl", 2.0), ("jsd", 2.0), ("logit_mse", 1.0)]:
        student, teacher = logits_of(200)
        spec, labels = divergence_spec(name, temperature=temperature), labels_of(200)
        totals = _totals(torch_rows, slab_of(student), slab_of(teacher), labels, spec)
        slabs = [slab_of(student), slab_of(student)]
        whole, rounded = (
            rows.pair_grad(
                slab,
                slab_of(teacher),
                totals,
                weights_of(labels),
                spec=spec,
                logit_map=MAPS[0],
                scratch=Scratch.of(slab),
                operand_dtype=dtype,
            )[1]
            for slab, dtype in zip(slabs, (torch.float32, torch.bfloat16), strict=True)
        )
        assert rounded.stride() == (2 * slabs[1].stride(0), 1)
        assert rounded.data_ptr() == slabs[1].data_ptr()
        assert torch.equal(rounded, truncated_to_bfloat16(whole))
        assert not front_of_rows(slabs[1], torch.bfloat16).isnan().any()


def test_bfloat16_gradient_is_the_float32_one_rounded_in_place(interpreters):
    interpreters.run(_check_bfloat16_pair)


def _check_laws(rank, world_size):
    """kd weight 0 with NaN totals gives the bits of cross-entropy; equal models give exactly 0."""
    rows = _triton_rows()
    for name in list(TRITON_DIVERGENCES)[rank::world_size]:
        spec, labels = divergence_spec(name, temperature=2.0), labels_of(101)
        student, teacher = logits_of(101)
        weights = replace(weights_of(labels), kd=torch.zeros(len(labels), dtype=torch.float64))
        settings = {"logit_map": MAPS[1], "scratch": Scratch.of(slab_of(student)), "operand_dtype": torch.float32}
        totals = _totals(rows, slab_of(student), slab_of(teacher), labels, spec)
        plain = rows.row_grad(slab_of(student), totals.student, weights, **settings)
        spoilt = replace(totals, z=torch.full_like(totals.z, torch.nan))
        _, got = rows.pair_grad(slab_of(student), slab_of(teacher), spoilt, weights, spec=spec, **settings)
        assert torch.equal(got, plain), name
        assert plain.any()
        zero = torch.zeros(len(labels), dtype=torch.float64)
        only_kd = RowWeights(zero + 1, zero, labels, zero)
        totals = _totals(rows, slab_of(student), slab_of(student), labels, spec)
        value, got = rows.pair_grad(slab_of(student), slab_of(student), totals, only_kd, spec=spec, **settings)
        assert not value.any(), name
        assert not got.any(), name


def test_equal_models_give_zero_and_kd_weight_zero_gives_the_bits_of_cross_entropy(interpreters):
    interpreters.run(_check_laws)


def _check_nan(rank, world_size):
    """A NaN logit of either model must reach the results; comparisons must not drop it."""
    rows = _triton_rows()
    student, teacher = logits_of(101)
    labels = labels_of(101)
    (teacher if rank else student)[2, 77] = torch.nan
    for name in TRITON_DIVERGENCES:
        spec = divergence_spec(name)
        settings = {"spec": spec, "scratch": Scratch.of(slab_of(student))}
        stats = rows.pair_stats(slab_of(student), slab_of(teacher), labels, **settings)
        totals = merge_pair_stats(stats[None], spec, VOCABULARY)
        value = rows.pair_value(slab_of(student), slab_of(teacher), totals, **settings)
        assert torch.equal(value.isnan(), torch.arange(len(labels)) == 2), name
        totals = _totals(torch_rows, *map(slab_of, logits_of(101)), labels, spec)
        parts = rows.pair_round2(slab_of(student), slab_of(teacher), totals, **settings)
        assert parts.isnan().any(1).tolist() == [False, False, True, False, False], name


def test_nan_logits_propagate(interpreters):
    interpreters.run(_check_nan)


def _check_loss(rank, world_size, over_group):
    """linear_kd_loss on this backend against float64: over the group, or at tp 1 with half of the cases per rank."""
    _triton_rows()
    group = dist.group.WORLD if over_group else None
    for name in list(TRITON_DIVERGENCES)[0 if over_group else rank :: 1 if over_group else world_size]:
        case = random_case(5, 101, divergence=name, properties=True, temperature=2.0)
        case = replace(case, parameters={**case.parameters, "backend": "triton"})
        got, shard = streamed_answer(case, group=group, multiple=1, chunk=3, measure=over_group)
        plain = replace(case, parameters={"temperature": 2.0})
        expected = naive_answer(plain)
        mine = slice(shard.start, shard.start + shard.valid_rows)
        assert abs(float(got.loss) / float(expected.loss) - 1) < 2e-6, name
        assert relative_error(got.grad_hidden, expected.grad_hidden) <= 1e-5, name
        error = (got.grad_weight.double() - expected.grad_weight[mine]).norm() / expected.grad_weight.norm()
        assert error <= 1e-5, name
        fields = reference_fields(plain) if over_group else {"kd": reference_fields(plain)["kd"]}
        for field, value in fields.items():
            torch.testing.assert_close(getattr(got.parts, field).double(), value, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("over_group", [False, True], ids=["tp1", "tp2"])
def test_losses_and_gradients_match_float64_for_every_divergence(interpreters, over_group):
    interpreters.run(_check_loss, over_group=over_group)


def _check_cross_entropy(rank, world_size):
    _triton_rows()
    case = random_case(9, 101)
    weight = case.head_s.weight.clone().requires_grad_()
    hidden = case.hidden_s.clone().requires_grad_()
    parts = linear_cross_entropy(
        hidden,
        weight,
        case.labels,
        weight=case.ce_weight,
        shard=stream.VocabShard.of(101, multiple=1),
        z_weight=torch.full((9,), 0.01),
        backend="triton",
        slab_bytes=4 * 128 * 8,
    )
    parts.loss.backward()
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    logits = h @ w.T
    ce = torch.nn.functional.cross_entropy(logits, case.labels, reduction="none", ignore_index=-100)
    ((case.ce_weight * ce).sum() + 0.01 * logits.logsumexp(1).square().sum()).backward()
    assert relative_error(hidden.grad, h.grad) <= 1e-5
    assert relative_error(weight.grad, w.grad) <= 1e-5


def test_gradient_of_cross_entropy_with_z_loss_matches_float64(interpreters):
    interpreters.run(_check_cross_entropy)


def _check_rows_far_apart(rank, world_size):
    """Three rows 2^30 elements apart, in memory that is committed only where it is touched."""
    rows = _triton_rows()
    apart, size, no_reserve = 1 << 30, 4 * (2 * (1 << 30) + 128), 0x4000  # MAP_NORESERVE of Linux
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        flat = torch.frombuffer((ctypes.c_float * (size // 4)).from_address(start), dtype=torch.float32)
        slab = flat.as_strided((3, 5), (apart, 1))
        values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
        slab.copy_(values)
        labels, ones = torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.float64)
        stats = rows.row_stats(slab, labels, 1.0, Scratch.of(values))
        expected = torch_rows.row_stats(values.double(), labels, 1.0, Scratch.of(values.double()))
        torch.testing.assert_close(stats, expected, rtol=1e-6, atol=1e-6)
        rows.row_grad(
            slab,
            rows.merge_stats(stats[None], 1.0),
            RowWeights(ones, ones, labels, ones),
            logit_map=LogitMap(),
            scratch=Scratch.of(values),
            operand_dtype=torch.float32,
        )
        right = values.double().softmax(-1) - torch.eye(5, dtype=torch.float64)[labels]
        torch.testing.assert_close(slab.double(), right, rtol=1e-6, atol=1e-7)
        del slab, flat


def test_rows_may_start_beyond_2_to_the_31_elements(interpreters):
    interpreters.run(_check_rows_far_apart)


def _check_refusals(rank, world_size):
    from kdtrain_kernels.triton import maths

    rows = _triton_rows()
    assert maths.FLOOR.value == blocks.FLOOR
    labels = torch.zeros(2, dtype=torch.int64)
    for slab, words in [
        (torch.zeros(2, 128, dtype=torch.float64), "float64, need float32"),
        (torch.zeros(2, 101), "101 columns has rows 101 elements apart"),
        (torch.zeros(400)[1:257].view(2, 128), "divisible by 16"),
    ]:
        with pytest.raises(ValueError, match=words):
            rows.row_stats(slab, labels, 1.0, Scratch.of(slab))
    with pytest.raises(ValueError, match=r"float32 logits, not torch\.float64; choose torch"):
        row_kernels("triton", torch.device("cpu"), torch.float64)


def test_unsupported_slabs_are_refused(interpreters):
    interpreters.run(_check_refusals)
