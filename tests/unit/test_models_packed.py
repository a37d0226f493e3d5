"""attention=packed, the function: forward and gradients against its definition in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from kdtrain.models.packed import attend_documents, by_document
from kdtrain.models.packed_sdpa import LARGE_BLOCK, SMALL_BLOCK
from kdtrain.models.packed_written import Written
from tests.support.packed_cases import CUTS, TOLERANCE, backward, compare, inputs, packing_of

SETTINGS = {
    "plain": {},
    "scaled": {"scaling": 0.7},
    "window 1": {"sliding_window": 1},
    "window 6": {"sliding_window": 6},
    "window 40": {"sliding_window": 40},
    "window 10000": {"sliding_window": 10000},
    "softcap": {"softcap": 1.5},
    "softcap in a window": {"softcap": 1.5, "sliding_window": 6, "scaling": 0.4},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "sinks in a window": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding_window": 6},
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cut", CUTS)
def test_forward_and_gradients_match_the_definition(cut, settings, dtype):
    packing = packing_of(CUTS[cut])
    compare(packing, inputs(packing, dtype=dtype), **settings)


@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (4, 1, 16, 16), (8, 2, 16, 16), (4, 2, 24, 16), (4, 4, 8, 20)])
@pytest.mark.parametrize("settings", [{}, {"sliding_window": 7}, {"softcap": 2.0}], ids=str)
def test_all_head_counts_and_widths_match_the_definition(heads, settings):
    for cut in ("rows differ", "many tiny", "one per row"):
        packing = packing_of(CUTS[cut])
        heads_q, heads_kv, width, value_width = heads
        tensors = inputs(packing, heads=heads_q, kv_heads=heads_kv, width=width, value_width=value_width)
        compare(packing, tensors, **settings)


@pytest.mark.parametrize("seed", range(8))
def test_random_documents_match_the_definition(seed):
    rng = torch.Generator().manual_seed(seed)
    seq_len, rows = int(torch.randint(1, 900, (1,), generator=rng)), []
    for _ in range(1 + seed % 3):
        borders = torch.randint(1, seq_len + 1, (1 + 4 * seed,), generator=rng).tolist()
        ends = sorted({*borders, seq_len})
        rows.append([end - begin for begin, end in zip([0, *ends], ends, strict=False)])
    packing = packing_of(rows)
    window = int(torch.randint(1, 400, (1,), generator=rng))
    compare(packing, inputs(packing, seed=seed))
    compare(packing, inputs(packing, seed=seed), sliding_window=window)
    compare(packing, inputs(packing, seed=seed), sliding_window=window, softcap=3.0)


@pytest.mark.parametrize("window", [2, 255, 300, 600, 1100])
@pytest.mark.parametrize("length", [2 * SMALL_BLOCK + 1, 1111, 1300])
def test_long_documents_with_a_window_match_the_definition(length, window):
    packing = packing_of([[length, 1400 - length]])
    compare(packing, inputs(packing, heads=2, kv_heads=1, width=8), sliding_window=window)


def test_lengths_at_and_next_to_block_borders_match_the_definition():
    window = 20
    for blocks in (0, 1, 2):
        for more in (-1, 0, 1):
            length = max(window + blocks * SMALL_BLOCK + more, 2 * SMALL_BLOCK + 1)
            packing = packing_of([[length]])
            compare(packing, inputs(packing, heads=1, kv_heads=1, width=8), sliding_window=window)
    assert LARGE_BLOCK > SMALL_BLOCK


def test_block_size_of_written_attention_changes_nothing():
    packing = packing_of([[50, 3, 3, 44]])
    tensors = inputs(packing)
    for most in (1, 500, 7000):
        for window in (None, 9):

            def function(qkv, packing, *, most=most, window=window, **_):
                written = Written(qkv[0].shape[-1] ** -0.5, window, most_logits=most)
                tokens = [x.transpose(1, 2).flatten(0, 1) for x in qkv]
                return by_document(tokens, packing, written).view(1, 100, 4, 16)

            compare(packing, tensors, function, sliding_window=window)


def test_single_document_rows_have_the_bits_of_plain_sdpa():
    packing = packing_of([[130], [130]])
    tensors = inputs(packing)

    def plain(qkv, packing):
        q, k, v = qkv
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5, enable_gqa=True)
        return out.transpose(1, 2).contiguous()

    found, want = (backward(function, tensors, packing, {}) for function in (attend_documents, plain))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_nan_in_one_document_does_not_reach_another():
    packing = packing_of([[3, 4, 2, 5, 1, 6], [21]])
    tensors = inputs(packing)
    clean = backward(attend_documents, tensors, packing, {})
    with torch.no_grad():
        for x in tensors:
            x[0, :, :3] = x[0, :, 7:9] = math.nan
    found = backward(attend_documents, tensors, packing, {})
    for name, a, b in zip("oqkv", found, clean, strict=True):
        a, b = (x if name == "o" else x.transpose(1, 2) for x in (a, b))
        if name == "o":
            assert a[0, :3].isnan().all()
        assert torch.equal(a[0, 3:7], b[0, 3:7]), name
        assert torch.equal(a[0, 9:], b[0, 9:]), name
        assert torch.equal(a[1], b[1]), name


def test_dropout_has_its_rate_and_keeps_the_mean():
    packing = packing_of([[64, 200]])
    q, k, _ = inputs(packing, heads=2, kv_heads=2)
    ones = torch.ones(1, 2, 264, 4)
    torch.manual_seed(0)
    found = attend_documents((q, k, ones.requires_grad_()), packing, dropout=0.25)
    assert found[0, 0].unique().numel() <= 2  # the first token has one weight: 1 / 0.75 or nothing
    assert abs(float(found.detach().mean()) - 1) < 0.05
    assert found.std() > 0.01
    # the recomputation in backward draws the same: the gradient of sum(out) is the column sums of dropped weights
    found.sum().backward()
    assert torch.allclose(ones.grad.sum(), found.detach().sum(), rtol=1e-5)
