"""Peak memory of the sparse loss: live bytes over forward and backward, at two numbers of tokens."""

import pytest
import torch
from kdtrain_kernels.blocks import CPU_BLOCK

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import SparseTarget, linear_sparse_kd_loss, matrix
from tests.support.live_bytes import LiveBytes

VOCAB, BUDGET, WIDTH, SLOTS = 8192, 1 << 23, 8, 6
CHUNK = 128  # tokens: BUDGET / (2 slabs * 4 bytes * VOCAB), a multiple of 8
BLOCK = 4 * CPU_BLOCK  # an eighth of a slab
BLOCKS = 2  # exp(x / temperature), and the slope of a cap or a rounded copy
TABLE = 8 * CHUNK * (SLOTS + 1) * 24  # float64 numbers per token and id of a chunk, two dozen of them


def problem(tokens):
    rng = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(tokens, WIDTH).requires_grad_(), torch.randn(VOCAB, WIDTH).requires_grad_()
    ids = torch.rand(tokens, VOCAB, generator=rng).topk(SLOTS).indices.int()
    weights = torch.full((tokens, SLOTS), 0.1)
    tail, zeros = torch.full((tokens,), 1 - 0.1 * SLOTS).log(), torch.zeros(tokens)
    return hidden, head, SparseTarget(ids, weights, tail, zeros, zeros), torch.randint(VOCAB, (tokens,))


def loss_of(hidden, head, target, labels, divergence):
    weight = torch.ones(len(labels))
    return linear_sparse_kd_loss(
        hidden,
        head,
        target,
        labels,
        divergence=divergence,
        temperature=2.0,
        kd_weight=weight,
        ce_weight=weight,
        shard=VocabShard.of(VOCAB, multiple=1),
        slab_bytes=BUDGET,
    ).loss


@pytest.mark.parametrize("name", matrix.F_DIVERGENCES)
def test_live_bytes_are_bounded_by_slab_blocks_and_gradients_at_any_number_of_tokens(name):
    slab, extra = BUDGET // 2, []
    for tokens in (2 * CHUNK, 16 * CHUNK):
        hidden, head, target, labels = problem(tokens)
        known = (hidden, head, labels, target.ids, target.weights, target.log_tail, target.entropy)
        with LiveBytes(*known) as live:
            loss_of(hidden, head, target, labels, name).backward()
        assert hidden.grad is not None
        assert head.grad is not None
        # gradients, held twice while backward scales them; numbers per token; sorting the ids to look for doubles
        allowed = 2 * 4 * WIDTH * (tokens + VOCAB) + 8 * 12 * tokens + 3 * 8 * SLOTS * tokens
        assert live.peak <= slab + BLOCKS * BLOCK + TABLE + allowed
        extra.append(live.peak - allowed)
    assert extra[1] <= extra[0] + slab // 4, "grew with the number of tokens by more than its gradients and numbers"
    assert extra[1] < 4 * 16 * CHUNK * VOCAB / 8, "less than an eighth of one [T, V] tensor"
