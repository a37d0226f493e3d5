"""attention=packed, the function: which calls it makes, what it holds in memory, what it refuses."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from kdtrain.documents import Documents
from kdtrain.errors import ConfigError
from kdtrain.models import packed
from kdtrain.models.context import ARGUMENT, Context, _View, packed_attention
from kdtrain.models.packed import attend_documents, by_varlen, plan
from kdtrain.models.packed_layout import SHORT, WASTE, Layout, Run
from kdtrain.models.packed_sdpa import repeated
from tests.support.live_bytes import LiveBytes
from tests.support.packed_cases import CUTS, backward, compare, definition, inputs, packing_of


def test_layout_bounds_padding_and_keeps_every_token_once():
    rng = torch.Generator().manual_seed(1)
    lengths = tuple(torch.randint(1, 500, (300,), generator=rng).tolist())
    layout = Layout.of(lengths)
    assert sum(layout.sizes) == sum(lengths)
    short = sum(length for length in lengths if length < SHORT)
    slots = sum(bucket.tokens for bucket in layout.buckets)
    assert short == len(layout.back)
    assert len(layout.there) == slots == len(layout.padding)
    assert slots <= WASTE * short
    assert torch.equal(layout.there[layout.back], torch.arange(short))
    assert int((~layout.padding).sum()) == short
    assert len(layout.buckets) < 30


def test_equal_and_long_documents_are_not_gathered():
    assert Layout.of((64,) * 6).stretches == (Run(6, 64),)
    assert Layout.of((300, 300, 17, 9)).stretches == (Run(2, 300), Run(1, 17), Run(1, 9))
    assert Layout.of((300, 1, 2, 3, 4, 300, 5)).stretches == (Run(1, 300), 10, Run(1, 300), 5)


def varlen_by_definition(query, key, value, cu_q, cu_k, *longest, scale, window_size, enable_gqa=False):
    """A stand-in that implements torch's documentation of varlen_attn and checks the requirements of its kernel."""
    max_q, max_k = longest
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert cu_q is cu_k
    assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0
    assert int(cu_q[0]) == 0
    assert int(cu_q[-1]) == len(query) == len(key)
    assert max_q == max_k >= int(cu_q.diff().max())
    assert max_q > 1
    assert enable_gqa or query.shape[1] == key.shape[1]
    left, right = window_size
    parts = []
    for begin, end in zip(cu_q.tolist(), cu_q[1:].tolist(), strict=False):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), dim=0) for x in (k, v))
        distance = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        hidden = (distance < -right) | (distance > left if left >= 0 else False)
        parts.append(((q @ k.mT * scale).masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


def varlen_of_torch_2_11(*arguments, return_aux=None, scale, window_size):
    """The same with the keyword parameters that torch 2.11 has."""
    return varlen_by_definition(*arguments, scale=scale, window_size=window_size)


@pytest.mark.parametrize("call", [varlen_by_definition, varlen_of_torch_2_11])
@pytest.mark.parametrize("heads", [(4, 2, 16, 16), (4, 4, 12, 20), (2, 1, 20, 8)])
@pytest.mark.parametrize("window", [None, 1, 6])
@pytest.mark.parametrize("cut", ["one token each", "rows differ", "many tiny"])
def test_variable_length_call_receives_documented_arguments(cut, window, heads, call):
    packing = packing_of(CUTS[cut])
    heads_q, heads_kv, width, value_width = heads
    tensors = inputs(packing, heads=heads_q, kv_heads=heads_kv, width=width, value_width=value_width)

    def function(qkv, packing, *, sliding_window):
        q, k, v = qkv
        tokens = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
        scale = q.shape[-1] ** -0.5
        found = by_varlen(tokens, packing, scale=scale, window=sliding_window, call=call)
        return found.view(len(q), q.shape[2], heads_q, value_width)

    compare(packing, tensors, function, sliding_window=window)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 6}, {"sliding_window": 500, "scaling": 0.7}], ids=str)
def test_attention_passes_its_settings_to_the_variable_length_call(settings, monkeypatch):
    packing = packing_of(CUTS["rows differ"])
    calls = []

    def call(*arguments, **more):
        calls.append(more["window_size"])
        return varlen_by_definition(*arguments, **more)

    monkeypatch.setattr(packed, "plan", lambda **_: ("varlen", "as on CUDA"))
    monkeypatch.setattr(packed, "by_varlen", partial(by_varlen, call=call))
    compare(packing, inputs(packing, width=12, value_width=20), **settings)
    assert calls[0] == ((5, 0) if settings.get("sliding_window") == 6 else (-1, 0))


def test_installed_torch_has_the_variable_length_call_with_our_arguments():
    assert packed.HAS_VARLEN
    assert "the device is cpu" in packed.varlen_obstacle(torch.device("cpu"))
    packing = packing_of(CUTS["rows differ"])
    tokens = [x.detach().transpose(1, 2).flatten(0, 1).bfloat16() for x in inputs(packing)]
    # its arguments are parsed and dispatched before the missing kernel raises
    with pytest.raises(RuntimeError, match=r"_flash_attention_forward|CPU"):
        by_varlen(tokens, packing, scale=0.1, window=None)


USUAL = dict(
    device_type="cuda", dtype=torch.bfloat16, width=128, written=False, dropout=False, obstacle=None, fits=True
)


@pytest.mark.parametrize(
    ("changes", "way", "words"),
    [
        ({}, "varlen", "half precision on CUDA"),
        ({"dtype": torch.float16, "width": 256}, "varlen", "half"),
        ({"dtype": torch.float32}, "buckets", "does not compute in float32"),
        ({"width": 264}, "buckets", "264"),
        ({"dropout": True}, "buckets", "no dropout"),
        ({"obstacle": "torch is old"}, "buckets", "torch is old"),
        ({"fits": False}, "buckets", "can count"),
        ({"written": True}, "written", "soft-capped"),
        ({"device_type": "cpu"}, "buckets", "cpu"),
        ({"device_type": "cpu", "dropout": True}, "written", "no dropout"),
        ({"device_type": "cpu", "written": True}, "written", "soft-capped"),
    ],
)
def test_chosen_way_and_its_reason(changes, way, words):
    found, reason = plan(**{**USUAL, **changes})
    assert found == way
    assert words in reason


def test_calls_are_split_at_kernel_limits(monkeypatch):
    packing = packing_of(CUTS["equal"])
    tensors = inputs(packing)
    whole = backward(attend_documents, tensors, packing, {})
    seen = []

    def two(length, heads, width):
        seen.append((length, heads, width))
        return 2

    monkeypatch.setattr("kdtrain.models.packed_sdpa.sequences_per_call", two)
    cut = backward(attend_documents, tensors, packing, {})
    assert seen == [(64, 4, 16)]
    for a, b in zip(cut, whole, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"sliding_window": 40}, {"softcap": 2.0}, {"dropout": 0.1}], ids=str)
@pytest.mark.parametrize("cut", ["long and tiny", "one per row"])
def test_meta_device_gets_tensors_of_the_right_shape(cut, settings):
    # torch's meta device computes shapes alone, by the lines that CUDA takes where there is no variable-length call
    packing = packing_of(CUTS[cut])
    tensors = [x.detach().to("meta").requires_grad_() for x in inputs(packing, value_width=20)]
    output = attend_documents(tensors, packing, **settings)
    assert output.device.type == "meta"
    batch, _, seq_len, _ = tensors[0].shape
    assert output.shape == (batch, seq_len, 4, 20)
    output.sum().backward()
    assert all(x.grad.shape == x.shape for x in tensors)


def test_heads_are_repeated_as_groups_are():
    kv = torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 4)
    assert repeated(kv, 2)[0, :, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_layout_is_built_once_for_all_layers():
    packing = packing_of(CUTS["long and tiny"])
    cpu = torch.device("cpu")
    assert packing.layout(cpu) is packing.layout(cpu)
    like = torch.empty(0)
    band = packing.band(4, 2, 3, like)
    assert packing.band(4, 2, 3, like) is band
    assert packing.band(4, 2, 3, like.double()).dtype == torch.float64
    assert band.isfinite().int().tolist() == [
        [1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
    ]
    assert band.stride() == (16, 1)
    context = Context(None, torch.arange(4)[None], Documents.of(torch.arange(4)[None]))
    assert context.packing is context.packing


def peak_of(function, seq_len, **settings):
    """Most bytes alive beyond inputs, their gradients and the output, in forward and backward."""
    length, value_width = settings.pop("document"), settings.pop("value_width", None)
    packing = packing_of([[length] * (seq_len // length)])
    tensors = inputs(packing, heads=2, kv_heads=1, width=8, value_width=value_width)
    leaves = [x.detach().requires_grad_() for x in tensors]
    with LiveBytes(*leaves) as live:
        function(leaves, packing, **settings).sum().backward()
    return live.peak


LINEAR = {
    "plain, short": {"document": 32},
    "plain, one": {"document": None},
    "window, one": {"document": None, "sliding_window": 100},
    "other widths": {"document": None, "value_width": 12},
    "softcap, one": {"document": None, "softcap": 2.0},
    "sinks, one": {"document": None, "s_aux": torch.zeros(2)},
    "softcap, tiny window": {"document": None, "softcap": 2.0, "sliding_window": 4},
    "dropout, one": {"document": None, "dropout": 0.1},
}


@pytest.mark.parametrize("case", LINEAR)
def test_memory_is_linear_in_the_sequence(case):
    small, large = (
        peak_of(attend_documents, seq_len, **{**LINEAR[case], "document": LINEAR[case]["document"] or seq_len})
        for seq_len in (2048, 4096)
    )
    assert large <= 2.2 * small
    assert large < 2 * 4 * 4096 * 4096, "as much as one matrix of all logits"


def test_memory_of_the_definition_is_quadratic():
    small, large = (peak_of(definition, seq_len, document=64) for seq_len in (1024, 2048))
    assert large > 3.5 * small


def refused(module=None, mask=None, packing_context=True, key_length=12, **settings):
    positions = torch.arange(12)[None]
    if packing_context:
        settings[ARGUMENT] = Context(None, positions, Documents.of(positions))
    query, key = torch.zeros(1, 2, 12, 4), torch.zeros(1, 2, key_length, 4)
    with pytest.raises(ConfigError) as error:
        packed_attention(module or torch.nn.Linear(1, 1), query, key, key, mask, **settings)
    text = str(error.value)
    assert "why: " in text
    assert "fix: " in text
    return text


def test_unsupported_arguments_are_refused_by_name():
    assert "Linear passes a mask of its own" in refused(mask=torch.zeros(1))
    assert "does not pass its keyword arguments on" in refused(packing_context=False)
    assert "passes position_bias" in refused(position_bias=torch.zeros(1))
    assert "passes head_mask, sinks" in refused(sinks=torch.zeros(2), head_mask=torch.zeros(2), position_ids=1)
    assert "passes non-causal queries" in refused(is_causal=False)
    assert "passes 12 queries and 7 keys" in refused(key_length=7)
    assert "SimpleNamespace passes non-causal queries" in refused(module=SimpleNamespace(is_causal=False))
    assert "Linear passes indices" in refused(module=_View(torch.nn.Linear(1, 1)), indices=torch.zeros(1))


def test_arguments_without_effect_are_accepted():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    context = Context(None, positions, Documents.of(positions))
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    want = attend_documents((q, k, v), context.packing)
    more = dict(position_ids=positions, use_cache=False, output_attentions=False, position_bias=None, s_aux=None)
    encoder = SimpleNamespace(is_causal=False)
    found, weights = packed_attention(encoder, q, k, v, None, is_causal=True, **more, **{ARGUMENT: context})
    assert weights is None
    assert torch.equal(found, want)


def test_documents_of_other_sequences_are_an_error():
    packing = packing_of([[4, 6]])
    with pytest.raises(ValueError, match="documents of 10 tokens"):
        attend_documents(torch.zeros(3, 1, 1, 11, 4).unbind(), packing)
    with pytest.raises(ValueError, match="documents of 10 tokens"):
        attend_documents(torch.zeros(3, 2, 1, 5, 4).unbind(), packing)
    with pytest.raises(ValueError, match="sliding_window = 0"):
        attend_documents(torch.zeros(3, 1, 1, 10, 4).unbind(), packing, sliding_window=0)
