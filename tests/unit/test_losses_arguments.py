"""Invalid arguments of the streamed losses: each is refused by name, value and rule."""

from dataclasses import replace

import pytest
import torch

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import linear_cross_entropy
from tests.support.loss_cases import loss_of, random_case

BAD = {
    "unknown divergence": ({"divergence": "kl"}, r"divergence = 'kl' is unknown; choose one of forward_kl"),
    "temperature zero": ({"temperature": 0.0}, r"temperature = 0.0, need a finite number > 0"),
    "temperature nan": ({"temperature": float("nan")}, r"temperature = nan, need"),
    "jsd share": ({"divergence": "jsd", "teacher_share": 1.5}, r"teacher_share = 1.5 must be in \[0, 1\]"),
    "jsd share text": ({"divergence": "jsd", "teacher_share": "0.3"}, r"teacher_share = '0\.3' must be a number"),
    "jsd share none": ({"divergence": "jsd", "teacher_share": None}, r"teacher_share = None must be a number"),
    "skew": ({"divergence": "skew_kl", "skew": 1.0}, r"skew = 1.0 must be in \[0, 1\)"),
    "alpha-beta": (
        {"divergence": "alpha_beta", "ab_alpha": 0.5, "ab_beta": -0.5},
        r"ab_alpha, ab_beta = 0.5, -0.5 must be finite and their sum above 0",
    ),
    "alpha-beta exponent": (
        {"divergence": "alpha_beta", "ab_alpha": 1.0, "ab_beta": 1e-3},
        r"ab_beta = 0.001 must be 0 or at least 0.01 in size",
    ),
    "temperature flag": ({"temperature": True}, r"temperature = True, need a finite number > 0"),
    "temperature huge": ({"temperature": 1e200}, r"temperature = 1e\+200, need a finite number > 0"),
    "shard of a group": (
        {"shard": VocabShard.of(202, 1, 2, multiple=1)},
        r"shard is slice 1 of 2, but this is rank 0 of a group of 1; give the group",
    ),
    "weight type": ({"kd_weight": [1.0] * 9}, r"kd_weight is a list, need a tensor"),
    "no divergence weight": ({"kd_weight": None}, r"kd_weight is a NoneType, need a tensor of one value per token"),
    "no label weight": ({"ce_weight": None}, r"ce_weight is a NoneType, need a tensor of one value per token"),
    "weight nan": ({"ce_weight": torch.full((9,), float("nan"))}, r"ce_weight holds NaN or infinity"),
    "slab type": ({"slab_bytes": 1e6}, r"slab_bytes = 1000000.0, need a whole number of bytes"),
    "hidden shape": ({"hidden_s": torch.zeros(2, 3, 16)}, r"hidden_s has shape \(2, 3, 16\), need \[tokens, width\]"),
    "hidden dtype": ({"hidden_t": torch.zeros(9, 24, dtype=torch.int64)}, r"hidden_t has dtype torch.int64"),
    "head width": ({"head_s": torch.zeros(101, 17)}, r"head_s has shape \(101, 17\), need \[rows, 16\]"),
    "head rows": ({"head_t": torch.zeros(100, 24)}, r"head_t has 100 rows, need 101: shard \[0, 101\)"),
    "head dtype": ({"head_s": torch.zeros(101, 16).bfloat16()}, r"head_s is torch.bfloat16 on cpu, need torch.float32"),
    "head bias": (
        {"head_s": HeadShard(torch.zeros(101, 16), torch.zeros(7))},
        r"head_s.bias has shape \(7,\), need \(101,\)",
    ),
    "softcap": (
        {"head_t": HeadShard(torch.zeros(101, 24), softcap=0.0)},
        r"head_t.softcap = 0.0, need a number > 0",
    ),
    "scale": (
        {"head_t": HeadShard(torch.zeros(101, 24), logit_scale=float("inf"))},
        r"head_t.logit_scale = inf, need a finite",
    ),
    "head device": (
        {"head_s": torch.zeros(101, 16, device="meta")},
        r"head_s is torch.float32 on meta, need",
    ),
    "teacher device": (
        {"hidden_t": torch.zeros(9, 24, device="meta"), "head_t": torch.zeros(101, 24, device="meta")},
        r"hidden_t is on meta, need cpu as hidden_s",
    ),
    "label device": (
        {"labels": torch.zeros(9, dtype=torch.int64, device="meta")},
        r"labels is on meta, need cpu as the hidden states",
    ),
    "teacher tokens": ({"hidden_t": torch.zeros(8, 24)}, r"hidden_t has 8 tokens, need 9"),
    "label count": ({"labels": torch.zeros(8, dtype=torch.int64)}, r"labels has shape \(8,\), need \(9,\)"),
    "label dtype": ({"labels": torch.zeros(9)}, r"labels has dtype torch.float32, need int64 or int32"),
    "label range": ({"labels": torch.full((9,), 101)}, r"labels\[0\] = 101, need one in \[0, 101\)"),
    "weight dtype": (
        {"kd_weight": torch.ones(9, dtype=torch.bool)},
        r"kd_weight has dtype torch.bool, need a floating",
    ),
    "weight grad": ({"ce_weight": torch.ones(9, requires_grad=True)}, r"ce_weight requires a gradient"),
    "slab": ({"slab_bytes": 807}, r"slab_bytes = 807, need at least 1024"),
    "backend": ({"backend": "triton-on-paper"}, r"backend = 'triton-on-paper' is not available for cpu"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name_value_and_rule(what):
    changes, message = BAD[what]
    case = replace(random_case(9, 101), ce_weight=torch.ones(9), labels=torch.arange(9))
    assert loss_of(case).loss.isfinite()
    with pytest.raises(ValueError, match=message):
        loss_of(case, **changes)


def test_errors_of_cross_entropy_use_its_argument_names():
    shard = VocabShard.of(101, multiple=1)
    hidden, head, labels, weight = torch.zeros(9, 16), torch.zeros(101, 16), torch.arange(9), torch.ones(9)
    with pytest.raises(ValueError, match=r"hidden has shape \(9,\)"):
        linear_cross_entropy(hidden[:, 0], head, labels, weight=weight, shard=shard)
    with pytest.raises(ValueError, match=r"^weight is a NoneType, need a tensor of one value per token"):
        linear_cross_entropy(hidden, head, labels, weight=None, shard=shard)
    with pytest.raises(ValueError, match=r"^weight has shape \(8,\)"):
        linear_cross_entropy(hidden, head, labels, weight=weight[:8], shard=shard)
    with pytest.raises(ValueError, match=r"labels\[2\] = -100, need one in \[0, 101\) because its weight is 1"):
        linear_cross_entropy(hidden, head, labels.where(labels != 2, -100), weight=weight, shard=shard)
