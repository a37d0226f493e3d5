"""Exact properties of the streamed losses in one process: special weights, masks, batches, no_grad, imports."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import linear_cross_entropy, linear_kd_loss, reference, stream
from kdtrain.losses.vocab_group import VocabGroup
from tests.support.loss_cases import (
    cut_head,
    loss_of,
    random_case,
    streamed_answer,
)

ALL = list(reference.DIVERGENCES)


class _Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kd_weight_zero_is_bitwise_plain_cross_entropy(name, temperature):
    case = random_case(37, 1000, divergence=name, properties=True, temperature=temperature)
    case = replace(case, kd_weight=torch.zeros(37))
    shard = VocabShard.of(1000)
    budget = stream.bytes_per_token(VocabGroup(shard, None), torch.float32) * 8
    got, _ = streamed_answer(case, chunk=8, multiple=128)
    hidden, head = case.hidden_s.clone().requires_grad_(), cut_head(case.head_s, shard)
    plain = linear_cross_entropy(hidden, head, case.labels, weight=case.ce_weight, shard=shard, slab_bytes=budget)
    plain.loss.backward()
    assert torch.equal(got.loss, plain.loss.detach())
    assert torch.equal(got.parts.ce, plain.ce)
    assert torch.equal(got.grad_hidden, hidden.grad)
    assert torch.equal(got.grad_weight, head.weight.grad[:1000])
    assert torch.equal(got.grad_bias, head.bias.grad[:1000])


@pytest.mark.parametrize("name", ALL)
def test_equal_models_give_exactly_zero_loss_and_gradient(name):
    case = random_case(37, 1000, divergence=name, properties=True, temperature=2.0)
    case = replace(case, hidden_t=case.hidden_s, head_t=case.head_s, ce_weight=torch.zeros(37))
    got, _ = streamed_answer(case, measure=True)
    assert float(got.loss) == 0.0
    assert not got.grad_hidden.any()
    assert not got.grad_weight.any()
    assert not got.parts.forward_kl.any()
    assert got.parts.agreement.all()


def test_no_grad_gives_the_same_values_without_gradient_products():
    for name in ALL:
        case = random_case(19, 101, divergence=name, temperature=2.0)
        with_grad = streamed_answer(case)[0].parts
        head = cut_head(case.head_s, VocabShard.of(101, multiple=1))
        with torch.no_grad(), _Products() as products:
            parts = linear_kd_loss(
                case.hidden_s.clone().requires_grad_(),
                head,
                case.hidden_t,
                case.head_t,
                case.labels,
                divergence=name,
                temperature=2.0,
                kd_weight=case.kd_weight,
                ce_weight=case.ce_weight,
                shard=VocabShard.of(101, multiple=1),
                slab_bytes=2 * 4 * 128 * 8,
            )
        assert not parts.loss.requires_grad
        torch.testing.assert_close(parts.kd, with_grad.kd, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(parts.loss, with_grad.loss.detach())
        assert products.count == 2 * 3, "more than both models' logits of three chunks was multiplied"


def test_loss_and_gradients_of_a_batch_are_the_sums_over_its_parts():
    whole = random_case(37, 101, divergence="skew_kl", dtype=torch.float64)
    total, _ = streamed_answer(whole)
    per_token = ("hidden_s", "hidden_t", "labels", "kd_weight", "ce_weight")
    answers = []
    for first, last in [(0, 1), (1, 20), (20, 37)]:
        part = replace(whole, **{name: getattr(whole, name)[first:last] for name in per_token})
        answers.append(streamed_answer(part)[0])
    torch.testing.assert_close(sum(a.loss for a in answers), total.loss)
    torch.testing.assert_close(torch.cat([a.grad_hidden for a in answers]), total.grad_hidden)
    torch.testing.assert_close(sum(a.grad_weight for a in answers), total.grad_weight)


def test_values_of_a_token_do_not_depend_on_the_batch_size():
    whole = random_case(37, 101, divergence="jsd")
    alone = replace(
        whole, **{n: getattr(whole, n)[:8] for n in ("hidden_s", "hidden_t", "labels", "kd_weight", "ce_weight")}
    )
    assert torch.equal(streamed_answer(whole, chunk=8)[0].parts.kd[:8], streamed_answer(alone, chunk=8)[0].parts.kd)


def test_upstream_scalar_scales_gradients_and_empty_batches_work():
    case = random_case(0, 101)
    got, _ = streamed_answer(case)
    assert float(got.loss) == 0.0
    assert not got.grad_weight.any()
    case = random_case(7, 101, dtype=torch.float64)
    plain, _ = streamed_answer(case)
    hidden = case.hidden_s.clone().requires_grad_()
    parts = loss_of(case, hidden_s=hidden)
    (parts.loss / 8).backward()
    torch.testing.assert_close(hidden.grad, plain.grad_hidden / 8)


# logit_mse compares logits themselves: a masked logit has no distance
@pytest.mark.parametrize("name", [name for name in ALL if name != "logit_mse"])
def test_ids_masked_in_both_models_equal_a_smaller_vocabulary(name):
    case = random_case(11, 101, divergence=name, dtype=torch.float64, temperature=2.0)
    labels = case.labels.clamp(max=89)
    bias = torch.zeros(101, dtype=torch.float64)
    bias[90:] = float("-inf")
    masked = replace(
        case,
        labels=labels,
        head_s=HeadShard(case.head_s.weight, bias),
        head_t=HeadShard(case.head_t.weight, bias),
    )
    short = replace(
        case,
        labels=labels,
        head_s=HeadShard(case.head_s.weight[:90]),
        head_t=HeadShard(case.head_t.weight[:90]),
    )
    got, expected = streamed_answer(masked)[0], streamed_answer(short)[0]
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(got.grad_hidden, expected.grad_hidden, rtol=1e-10, atol=1e-13)
    assert not got.grad_weight[90:].any()


@pytest.mark.parametrize("op", ["ce", *ALL])
def test_token_of_weight_zero_may_hold_nan_or_an_impossible_label(op):
    """A masked label or NaN at a padding position must change neither the loss nor any gradient."""
    case = random_case(9, 101, divergence="forward_kl" if op == "ce" else op)
    weight = case.head_s.weight
    bias = torch.zeros(101)
    bias[5] = float("-inf")
    labels, ce_weight, kd_weight = case.labels.clone(), torch.ones(9), torch.ones(9)
    labels[:] = torch.arange(9) + 20
    labels[2], ce_weight[2] = 5, 0.0  # an impossible label that does not count
    kd_weight[3] = 0.0
    answers = []
    for garbage in (0.0, float("nan")):
        hidden_t = case.hidden_t.clone()
        hidden_t[3] += garbage
        hidden, head = case.hidden_s.clone().requires_grad_(), weight.clone().requires_grad_()
        settings = {"labels": labels, "ce_weight": ce_weight, "kd_weight": kd_weight, "hidden_t": hidden_t}
        if op == "ce":
            loss = linear_cross_entropy(
                hidden, HeadShard(head, bias), labels, weight=ce_weight, shard=VocabShard.of(101, multiple=1)
            ).loss
        else:
            head_t = HeadShard(case.head_t.weight, bias)
            loss = loss_of(case, hidden_s=hidden, head_s=HeadShard(head, bias), head_t=head_t, **settings).loss
        loss.backward()
        assert loss.isfinite()
        assert hidden.grad.isfinite().all()
        assert head.grad.isfinite().all()
        answers.append((loss.detach(), hidden.grad, head.grad))
    for one, other in zip(*answers, strict=True):
        assert torch.equal(one, other)


def test_second_derivatives_are_refused():
    case = random_case(9, 101)
    hidden = case.hidden_s.clone().requires_grad_()
    loss = loss_of(case, hidden_s=hidden).loss
    (gradient,) = torch.autograd.grad(loss * loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_hidden_states_may_have_any_memory_layout():
    case = random_case(9, 101)
    right = streamed_answer(case)[0]
    turned = case.hidden_s.T.contiguous().T
    assert not turned.is_contiguous()
    got = streamed_answer(replace(case, hidden_s=turned, hidden_t=case.hidden_t.T.contiguous().T))[0]
    torch.testing.assert_close(got.grad_hidden, right.grad_hidden)


def test_losses_work_without_deepspeed_and_transformers():
    script = """
import sys
for name in ("deepspeed", "transformers", "omegaconf"):
    sys.modules[name] = None  # any import of it now raises
import torch
from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import LossParts, linear_cross_entropy, linear_kd_loss, reference
h = torch.randn(5, 8, requires_grad=True); w = torch.randn(128, 8, requires_grad=True)
ones = torch.ones(5)
parts = linear_kd_loss(h, w, torch.randn(5, 4), torch.randn(128, 4), torch.arange(5), divergence="jsd",
                       kd_weight=ones, ce_weight=ones, shard=VocabShard.of(120))
parts.loss.backward()
assert isinstance(parts, LossParts) and w.grad[:120].any() and not w.grad[120:].any()
print("worked")
"""
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.stdout == "worked\n", result.stderr
