"""The three products of a head, by torch.mm and by oneDNN's panels, against float64."""

import kdtrain_kernels.matmul as matmul
import pytest
import torch

C, D, N = 40, 24, matmul.ONEDNN_ROWS + 3
HEADS = {"contiguous": lambda w: w, "transposed": lambda w: w.T.contiguous().T, "bfloat16": lambda w: w.bfloat16()}

needs_onednn = pytest.mark.skipif(
    not matmul.uses_onednn(torch.empty(N, D), torch.float32), reason="needs a CPU with AVX-512 and torch with oneDNN"
)


def operands(seed=0):
    """Hidden states, a head, and d(logits) that lie in rows further apart than their columns, as in a slab."""
    rng = torch.Generator().manual_seed(seed)
    hidden, weight, slab = (torch.randn(*shape, generator=rng) for shape in ((C, D), (N, D), (C, N + 61)))
    return hidden, weight, slab[:, :N]


def products(hidden, weight, grad_logits):
    logits, grad_hidden = torch.empty(C, N + 61)[:, :N], torch.full((C, D), torch.nan)
    total = torch.ones(N, D)
    matmul.logits_into(logits, hidden, weight)
    matmul.hidden_grad_into(grad_hidden, grad_logits, weight)
    matmul.add_weight_grad_(total, grad_logits, hidden)
    return logits, grad_hidden, total


@needs_onednn
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("panel", [matmul.PANEL_ELEMENTS, 130 * C])
def test_products_by_onednn_agree_with_float64(monkeypatch, kind, panel):
    hidden, weight, grad_logits = operands()
    head = HEADS[kind](weight)
    calls = []
    right = matmul._onednn
    monkeypatch.setattr(matmul, "_onednn", lambda *x: calls.append(x) or right(*x))
    monkeypatch.setattr(matmul, "PANEL_ELEMENTS", panel)
    got = products(hidden, head, grad_logits)
    assert len(calls) == 3 * (9 if panel == 130 * C else 1)
    h, w, g = hidden.double(), head.double(), grad_logits.double()
    for found, want in zip(got, (h @ w.T, g @ w, 1 + g.T @ h), strict=True):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-4)


@needs_onednn
def test_a_row_of_logits_has_the_same_bits_in_every_batch():
    hidden, weight, _ = operands()
    whole, part = torch.empty(C, N), torch.empty(5, N)
    assert torch.equal(matmul.logits_into(whole, hidden, weight)[:5], matmul.logits_into(part, hidden[:5], weight))


def test_small_and_float64_products_and_other_processors_are_left_to_torch(monkeypatch):
    weight = torch.empty(N, D)
    assert not matmul.uses_onednn(weight[: matmul.ONEDNN_ROWS - 1], torch.float32)
    assert not matmul.uses_onednn(weight, torch.float64)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not matmul.uses_onednn(weight, torch.float32)
