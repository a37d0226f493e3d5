"""Peak memory of the streamed losses: live bytes over forward and backward, not only the largest tensor."""

import pytest
import torch
from kdtrain_kernels.blocks import CPU_BLOCK

from kdtrain.distributed.vocab import VocabShard
from kdtrain.losses import linear_cross_entropy, linear_kd_loss, reference
from tests.support.live_bytes import LiveBytes

VOCAB, BUDGET, WIDTHS = 8192, 1 << 23, (8, 12)
CHUNK = 128  # tokens: BUDGET / (2 models * 4 bytes * VOCAB), a multiple of 8
BLOCK = 4 * CPU_BLOCK  # an eighth of a slab
BLOCKS = {None: 2, "alpha_beta": 12}
BLOCKS_OF_OTHERS = 9
"""Cache blocks that a formula's intermediate results fill, temporaries included."""


def naive(hidden, head, hidden_t, head_t, labels, weight):
    log_q, log_p = (hidden @ head.T).log_softmax(1), (hidden_t @ head_t.T).log_softmax(1)
    kl = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return kl + torch.nn.functional.nll_loss(log_q, labels, reduction="sum")


def plain(hidden, head, hidden_t, head_t, labels, weight):
    shard = VocabShard.of(VOCAB, multiple=1)
    return linear_cross_entropy(hidden, head, labels, weight=weight, shard=shard, slab_bytes=BUDGET).loss


def streamed(divergence):
    def loss(hidden, head, hidden_t, head_t, labels, weight):
        return linear_kd_loss(
            hidden,
            head,
            hidden_t,
            head_t,
            labels,
            divergence=divergence,
            temperature=2.0,
            kd_weight=weight,
            ce_weight=weight,
            shard=VocabShard.of(VOCAB, multiple=1),
            slab_bytes=BUDGET,
            measure=True,
        ).loss

    return loss


def peak(loss_of, tokens, dtype=torch.float32):
    """(most live bytes beyond the inputs, bytes that gradients and per-token float64 numbers may take)."""
    hidden, head = (torch.randn(size, WIDTHS[0], dtype=dtype).requires_grad_() for size in (tokens, VOCAB))
    hidden_t, head_t = (torch.randn(size, WIDTHS[1], dtype=dtype) for size in (tokens, VOCAB))
    labels, weight = torch.randint(VOCAB, (tokens,)), torch.ones(tokens)
    with LiveBytes(hidden, head, hidden_t, head_t, labels, weight) as live:
        loss_of(hidden, head, hidden_t, head_t, labels, weight).backward()
    assert hidden.grad is not None
    assert head.grad is not None
    # each gradient is held twice while backward scales it; the rest is numbers per token
    return live.peak, 2 * 4 * WIDTHS[0] * (tokens + VOCAB) + 8 * 16 * tokens


def test_counter_measures_the_naive_formulas_logits():
    counted, _ = peak(naive, 512)
    slab = 4 * 512 * VOCAB
    assert 4 * slab <= counted <= 8 * slab


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in [*sorted(reference.DIVERGENCES), None]]
    + [("forward_kl", torch.bfloat16), ("jsd", torch.bfloat16)],
)
def test_live_bytes_are_bounded_by_slabs_blocks_and_gradients_at_any_number_of_tokens(name, dtype):
    loss_of = plain if name is None else streamed(name)
    slabs = BUDGET if name is not None else BUDGET // 2  # one model needs half
    extra = []
    for tokens in (2 * CHUNK, 12 * CHUNK):
        counted, allowed = peak(loss_of, tokens, dtype)
        assert counted <= slabs + BLOCKS.get(name, BLOCKS_OF_OTHERS) * BLOCK + allowed, (name, tokens)
        extra.append(counted - allowed)
    assert extra[1] <= extra[0] + BLOCK, "grew with the number of tokens by more than its gradients and numbers"
    assert extra[0] >= slabs, "the slabs were not counted"
