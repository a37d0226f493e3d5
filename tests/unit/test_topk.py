"""Top-k lists in one process: exact order, log-sum-exp and tail against float64, memory, refusals."""

import re
from dataclasses import replace

import pytest
import torch
from kdtrain_kernels import topk_dispatch, topk_rows
from kdtrain_kernels.blocks import Scratch
from kdtrain_kernels.topk_dispatch import TRITON_MAX_K, topk_kernels
from kdtrain_kernels.topk_rows import NO_ID, order_keys, split_keys, topk_merge, topk_select

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.teacher.topk import linear_topk
from tests.support.topk_cases import LargestTensor, assert_same_topk, random_teacher, slab_bytes_for, whole_logits

INF = float("inf")


def rows(n, seed=0):
    """[rows, n] logits with ties, constants, masked ids, signed zeros, a peak, clusters and infinities."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(12, n, generator=rng)
    x[1] = x[1].round()
    x[2] = 3.0
    x[3] = -INF
    x[4, torch.rand(n, generator=rng) < 0.9] = -INF
    x[5] = torch.where(torch.rand(n, generator=rng) < 0.5, 0.0, -0.0)
    x[6, n // 2] = 100.0
    x[7] = torch.arange(n) * 1e-3
    x[8] = torch.arange(n, 0, -1) * 1e-3
    x[9, : n // 3] += 9.0
    x[10] = torch.linspace(-1, 1, n) * 3e38
    x[11] = (x[11] > 1.5).float() * -0.0
    return x


def padded(x, garbage):
    """The same numbers with a larger row stride and garbage between the rows."""
    memory = torch.full((x.shape[0], x.shape[1] + 7), garbage, dtype=x.dtype)
    memory[:, : x.shape[1]] = x
    return memory[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 3), (5, 9), (101, 1), (640, 20), (1000, 64), (4099, 33), (5000, 1)])
def test_selection_is_a_stable_descending_sort_of_any_row(n, k, dtype):
    x = rows(n).to(dtype)
    slab = padded(x, float("nan"))
    got = topk_select(slab, k, (1.0,), entropy=False, scratch=Scratch.of(slab))
    values, order = x.sort(dim=1, descending=True, stable=True)
    k = min(n, k)
    assert torch.equal(got.columns, order[:, :k])
    assert torch.equal(got.values, values[:, :k])
    assert not got.values.signbit()[got.values == 0].any(), "a zero kept its sign"
    assert not got.stats[:, 0].any()
    assert torch.equal(slab, x.scatter(1, order[:, :k], -INF)), "only listed entries are masked"


def test_tail_sums_are_accurate_relative_to_the_tail_at_any_temperature():
    x = rows(1000)[[0, 1, 2, 4, 6, 9]]
    for k in (1, 64, 999, 1000):
        slab = x.clone()
        got = topk_select(slab, k, (0.5, 1.0, 3.0), entropy=True, scratch=Scratch.of(slab))
        merged = topk_merge(got.values[None], got.columns[None], got.stats[None], k, (0.5, 1.0, 3.0), entropy=True)
        tail = x.double().sort(dim=1, descending=True, stable=True).values[:, k:]
        for place, temperature in enumerate((0.5, 1.0, 3.0)):
            lse = (x.double() / temperature).logsumexp(1)
            torch.testing.assert_close(merged.lse[:, place], lse, rtol=1e-6, atol=1e-6)
            expected = (tail / temperature).logsumexp(1) - lse
            torch.testing.assert_close(merged.log_tail[:, place], expected, rtol=1e-6, atol=1e-6)
        log_p = (x.double() / 0.5).log_softmax(1)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(1)
        torch.testing.assert_close(merged.entropy, entropy, rtol=2e-6, atol=1e-9)
        peak = tail[:, 0] if k < 1000 else torch.full((len(x),), -INF, dtype=torch.float64)
        assert torch.equal(merged.tail_peak, peak)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merged_parts_of_a_vocabulary_equal_a_selection_from_the_whole(dtype):
    x = rows(300)[[0, 1, 2, 4, 6, 9]].to(dtype)
    k, temperatures = 20, (2.0, 1.0)

    def selected(part):
        return topk_select(part, k, temperatures, entropy=True, scratch=Scratch.of(part))

    whole = selected(x.clone())
    expected = topk_merge(whole.values[None], whole.columns[None], whole.stats[None], k, temperatures, entropy=True)
    lists = torch.full((3, len(x), k), -INF, dtype=dtype), torch.full((3, len(x), k), NO_ID)
    stats = torch.zeros(3, *whole.stats.shape, dtype=torch.float64)
    for rank, columns in enumerate((slice(0, 150), slice(150, 292), slice(292, 300))):
        part = selected(x[:, columns].clone())
        width = part.values.shape[1]
        lists[0][rank, :, :width], lists[1][rank, :, :width] = part.values, part.columns + columns.start
        stats[rank] = part.stats
    got = topk_merge(*lists, stats, k, temperatures, entropy=True)
    assert torch.equal(got.ids, expected.ids)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.tail_peak, expected.tail_peak)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.numbers, expected.numbers, rtol=tolerance, atol=tolerance)


def test_keys_keep_values_ids_and_their_order():
    values = torch.tensor([[-INF, -3e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 1.5, 3e38, INF]])
    ids = torch.tensor([[9, 8, NO_ID, 0, 5, 4, 3, 2, 1, 0]])
    keys = order_keys(values, ids)
    assert torch.equal(keys, keys.sort(dim=1).values)
    back = split_keys(keys)
    assert torch.equal(back[0], values + 0.0)
    assert torch.equal(back[1], ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [8, 37, 1000])
@pytest.mark.parametrize(("vocab", "k"), [(101, 1), (101, 100), (101, 101), (1000, 9), (2600, 64)])
def test_equal_logits_of_a_head_are_in_the_order_of_ids(vocab, k, chunk, dtype):
    hidden, head = random_teacher(37, vocab, dtype=dtype, integers=True)
    logits = whole_logits(hidden, head)
    assert k < 3 or (logits.topk(k).values.diff(dim=1) == 0).any(), "the logits must have ties"
    shard = VocabShard.of(vocab, multiple=1)
    got = linear_topk(
        hidden,
        head,
        k,
        shard=shard,
        temperatures=(1.0, 2.0),
        slab_bytes=slab_bytes_for(chunk, shard, dtype),
    )
    assert got.logits.dtype == dtype
    assert_same_topk(got, logits, k, (1.0, 2.0), 2e-6 if dtype == torch.float32 else 1e-12)
    assert (got.log_tail == -INF).all() == (k == vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bias_scale_soft_cap_padding_and_masked_ids_are_honoured(dtype):
    hidden, head = random_teacher(37, 300, dtype=dtype, properties=True)
    head.bias[7::11] = -INF
    head = replace(head, softcap=None) if dtype == torch.float32 else head
    # a soft-cap brings a masked id to -softcap: it is masked before the cap
    logits = whole_logits(hidden, head)
    shard = VocabShard.of(300)
    grown = replace(
        head,
        weight=torch.cat([head.weight, torch.full((shard.rows - 300, 12), 1e3, dtype=dtype)]),
        bias=torch.cat([head.bias, torch.full((shard.rows - 300,), 1e3, dtype=dtype)]),
    )
    got = linear_topk(hidden, grown, 20, shard=shard, slab_bytes=slab_bytes_for(8, shard, dtype))
    assert_same_topk(got, logits, 20, (1.0,), 3e-6 if dtype == torch.float32 else 1e-12)


def test_half_precision_is_multiplied_in_float32():
    hidden, head = random_teacher(9, 500, dtype=torch.bfloat16)
    got = linear_topk(hidden, head.weight, 5, shard=VocabShard.of(500, multiple=1))
    assert got.logits.dtype == torch.float32
    assert_same_topk(got, whole_logits(hidden, head), 5, (1.0,), 3e-6)


def test_a_row_of_only_masked_ids_is_listed_in_order_with_no_mass():
    hidden = torch.zeros(2, 3)
    head = HeadShard(torch.zeros(50, 3), torch.full((50,), -INF))
    got = linear_topk(hidden, head, 4, shard=VocabShard.of(50, multiple=1))
    assert got.ids.tolist() == [[0, 1, 2, 3]] * 2
    assert (got.logits == -INF).all()
    assert (got.lse == -INF).all()
    assert (got.log_tail == -INF).all()


def test_no_tokens_give_empty_results():
    got = linear_topk(torch.zeros(0, 3), torch.zeros(50, 3), 4, shard=VocabShard.of(50, multiple=1))
    assert got.ids.shape == (0, 4)
    assert got.log_tail.shape == (0, 1)


def test_results_have_no_gradient_and_inputs_are_unchanged():
    hidden, head = random_teacher(5, 60)
    hidden.requires_grad_()
    before = hidden.detach().clone(), head.weight.clone()
    got = linear_topk(hidden, head, 4, shard=VocabShard.of(60, multiple=1))
    assert not got.logits.requires_grad
    assert torch.equal(hidden.detach(), before[0])
    assert torch.equal(head.weight, before[1])


def test_no_tensor_is_larger_than_the_slab_or_the_results_at_any_number_of_tokens():
    vocab, k, tokens = 2000, 8, 4096
    hidden, head = random_teacher(tokens, vocab)
    shard = VocabShard.of(vocab, multiple=1)
    budget = slab_bytes_for(64, shard, torch.float32)
    inputs = max(t.untyped_storage().nbytes() for t in (hidden, head.weight))
    with LargestTensor() as seen:
        linear_topk(hidden, head, k, shard=shard, slab_bytes=budget)
    assert budget <= seen.bytes <= max(budget, inputs, 8 * k * tokens)
    assert seen.bytes < 4 * tokens * vocab / 16


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_bad_logits_are_refused_with_the_first_token(poison):
    hidden, head = random_teacher(37, 101)
    hidden[23, 5] = hidden[30, 2] = poison
    head.weight.abs_()
    shard = VocabShard.of(101, multiple=1)
    with pytest.raises(ValueError, match=re.escape("the logits of hidden_t[23] hold NaN or +inf")):
        linear_topk(hidden, head, 4, shard=shard, slab_bytes=slab_bytes_for(8, shard, torch.float32))


@pytest.mark.parametrize("n", [40, 4000])
def test_nan_anywhere_in_a_row_sets_its_flag(n):
    for place in (0, n // 2, n - 1):
        for value in (float("nan"), -float("nan"), INF):
            slab = torch.randn(3, n)
            slab[1, place] = value
            got = topk_select(slab, 2, (1.0,), entropy=False, scratch=Scratch.of(slab))
            assert got.stats[:, 0].tolist() == [0.0, 1.0, 0.0], (place, value)


REFUSED = [
    ({"k": 0}, "k = 0, need an integer in [1, 101], the size of the vocabulary"),
    ({"k": 102}, "k = 102, need an integer in [1, 101]"),
    ({"temperatures": ()}, "temperatures = (), need at least one number > 0"),
    ({"temperatures": (1.0, 0.0)}, "temperature = 0.0, need"),
    ({"temperatures": (INF,)}, "temperature = inf, need"),
    ({"slab_bytes": 511}, "slab_bytes = 511, need an integer of at least 512: the logits of one token"),
    ({"backend": "abacus"}, "backend = 'abacus' is not available for cpu; choose auto or torch"),
    ({"hidden_t": torch.zeros(2, 3, 12)}, "hidden_t has shape (2, 3, 12), need [tokens, width]"),
    ({"hidden_t": torch.zeros(2, 5)}, "head_t has shape (101, 12), need [rows, 5] as hidden_t"),
    ({"hidden_t": torch.zeros(2, 12).double()}, "head_t is torch.float32 on cpu, need torch.float64 on cpu"),
    ({"k": 4.0}, "k = 4.0, need an integer in [1, 101]"),
    ({"slab_bytes": 1e6}, "slab_bytes = 1000000.0, need an integer of at least 512"),
    ({"shard": VocabShard.of(101, 1, 2, multiple=1)}, "shard is slice 1 of 2, but this is rank 0 of a group of 1"),
    ({"shard": VocabShard.of(101)}, "head_t has 101 rows, need 128: shard [0, 128)"),
]


@pytest.mark.parametrize(
    ("change", "message"), REFUSED, ids=[next(iter(c)) + str(i) for i, (c, _) in enumerate(REFUSED)]
)
def test_invalid_arguments_are_refused_by_name(change, message):
    hidden, head = random_teacher(2, 101)
    arguments = {"hidden_t": hidden, "head_t": head, "k": 4, "shard": VocabShard.of(101, multiple=1), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_topk(**arguments)


def test_auto_uses_torch_where_triton_has_no_kernel_and_explicit_triton_is_refused(monkeypatch, caplog):
    """With the row kernels of a device replaced by none."""
    cpu = torch.device("cpu")
    assert topk_kernels("auto", cpu, torch.float32, 5) is topk_rows
    monkeypatch.setattr(topk_dispatch, "row_kernels", lambda backend, device, work: None)
    with caplog.at_level("INFO", "kdtrain"):
        assert topk_kernels("auto", cpu, torch.float32, TRITON_MAX_K + 1) is topk_rows
    assert f"torch, because k = {TRITON_MAX_K + 1} is more than triton's {TRITON_MAX_K}" in caplog.text
    with pytest.raises(ValueError, match=rf"no top-k kernels for k = {TRITON_MAX_K + 1}, need k <="):
        topk_kernels("triton", cpu, torch.float32, TRITON_MAX_K + 1)
