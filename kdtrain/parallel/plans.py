"""kdtrain's tensor-parallel plans: for models that declare none, or one that is wrong or shards less than possible.

Data only. Styles have transformers' names, except for those marked as kdtrain's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

COLWISE = "colwise"
ROWWISE = "rowwise"
PARTIAL_GRAD = "replicated_with_grad_allreduce"
GATHERED = "colwise_gather_output"
SPLIT_INPUT = "rowwise_split_input"

FUSED_QKV = "fused_qkv"
"""kdtrain's: column layer whose output consists of all queries, then all keys, then all values."""
FUSED_HALVES = "fused_halves"
"""kdtrain's: column layer whose output consists of two halves that the model multiplies (gate and up)."""
COPYING = "colwise_copy_input"
"""kdtrain's: column layer whose input is not the input of its block, or not the only one."""
REPLICATED = "replicate"
"""Every rank holds and computes the whole module."""

HEADS, KV_HEADS, WIDTH = "query heads", "key/value heads", "query heads times head_dim"


@dataclass(frozen=True, slots=True)
class OwnPlan:
    """styles: by module pattern, `*` for a number; they override the model's plan.

    local: attributes of attention modules that hold a count of heads or features, and the count of this rank to set;
    "config.NAME" for an attribute of the module's config.
    """

    styles: Mapping[str, str]
    local: Mapping[str, str] = field(default_factory=dict)


_GATE_UP = {"model.layers.*.mlp.gate_up_proj": FUSED_HALVES, "model.layers.*.mlp.down_proj": ROWWISE}
_PHI3 = OwnPlan(
    {"model.layers.*.self_attn.qkv_proj": FUSED_QKV, "model.layers.*.self_attn.o_proj": ROWWISE, **_GATE_UP},
    {"config.num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS},
)


def _gpt2(attention: str, mlp: str) -> dict[str, str]:
    return {
        f"{attention}.c_attn": FUSED_QKV,
        f"{attention}.c_proj": ROWWISE,
        f"{mlp}.c_fc": COLWISE,
        f"{mlp}.c_proj": ROWWISE,
    }


_GPT2 = OwnPlan(_gpt2("transformer.h.*.attn", "transformer.h.*.mlp"), {"num_heads": HEADS, "split_size": WIDTH})


def _separate(attention: str, out: str, up: str, down: str, up_style: str = COLWISE) -> dict[str, str]:
    """Attention of q_proj, k_proj, v_proj and `out`, and an MLP of two layers."""
    columns = {f"{attention}.{name}": COLWISE for name in ("q_proj", "k_proj", "v_proj")}
    return {**columns, f"{attention}.{out}": ROWWISE, up: up_style, down: ROWWISE}


def _decoder(layer: str, local: Mapping[str, str]) -> OwnPlan:
    """Decoders like BART's: the MLP is fc1 and fc2 of the layer itself."""
    return OwnPlan(_separate(f"{layer}.self_attn", "out_proj", f"{layer}.fc1", f"{layer}.fc2", COPYING), local)


OWN_PLANS: Mapping[str, OwnPlan] = {
    "gpt2": _GPT2,
    "gpt-sw3": _GPT2,
    "phi3": _PHI3,
    "glm": OwnPlan(_GATE_UP),
    "glm4": OwnPlan(_GATE_UP),
    # xIELU has two learned scalars, which are applied to this rank's features only.
    "apertus": OwnPlan({"model.layers.*.mlp.act_fn": PARTIAL_GRAD}),
    "apertus1p5_text": OwnPlan({"model.layers.*.mlp.act_fn": PARTIAL_GRAD}),
    "lfm2": OwnPlan(
        {
            **_separate(
                "model.layers.*.self_attn",
                "out_proj",
                "model.layers.*.feed_forward.w1",
                "model.layers.*.feed_forward.w2",
            ),
            "model.layers.*.feed_forward.w3": COLWISE,
            "model.layers.*.self_attn.q_layernorm": PARTIAL_GRAD,
            "model.layers.*.self_attn.k_layernorm": PARTIAL_GRAD,
        }
    ),
    # Which features are active depends on the mean and standard deviation of all: transformers' plan is wrong.
    "gemma3n_text": OwnPlan(
        {
            "model.layers.*.mlp.gate_proj": GATHERED,
            "model.layers.*.mlp.up_proj": GATHERED,
            "model.layers.*.mlp.down_proj": SPLIT_INPUT,
        }
    ),
    # Its dynamic mask needs the values of all heads.
    "doge": OwnPlan(
        {
            **{f"model.layers.*.self_attn.{name}": GATHERED for name in ("q_proj", "k_proj", "v_proj")},
            "model.layers.*.self_attn.dt_proj": REPLICATED,
            "model.layers.*.self_attn.o_proj": SPLIT_INPUT,
        }
    ),
    "opt": _decoder("model.decoder.layers.*", {"num_heads": HEADS}),
    "biogpt": _decoder("biogpt.layers.*", {}),
    "hunyuan_v1_dense": OwnPlan(
        {
            **_separate(
                "model.layers.*.self_attn", "o_proj", "model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj"
            ),
            "model.layers.*.mlp.gate_proj": COLWISE,
            "model.layers.*.self_attn.query_layernorm": PARTIAL_GRAD,
            "model.layers.*.self_attn.key_layernorm": PARTIAL_GRAD,
        }
    ),
    "gptj": OwnPlan(
        _separate("transformer.h.*.attn", "out_proj", "transformer.h.*.mlp.fc_in", "transformer.h.*.mlp.fc_out"),
        {"num_attention_heads": HEADS},
    ),
    "gpt_neo": OwnPlan(
        _separate(
            "transformer.h.*.attn.attention", "out_proj", "transformer.h.*.mlp.c_fc", "transformer.h.*.mlp.c_proj"
        ),
        {"num_heads": HEADS},
    ),
    "stablelm": OwnPlan(
        {
            **_separate(
                "model.layers.*.self_attn", "o_proj", "model.layers.*.mlp.up_proj", "model.layers.*.mlp.down_proj"
            ),
            "model.layers.*.mlp.gate_proj": COLWISE,
        },
        {"num_heads": HEADS, "num_key_value_heads": KV_HEADS},
    ),
    "persimmon": OwnPlan(
        {
            "model.layers.*.self_attn.query_key_value": COLWISE,
            "model.layers.*.self_attn.dense": ROWWISE,
            "model.layers.*.self_attn.q_layernorm": PARTIAL_GRAD,
            "model.layers.*.self_attn.k_layernorm": PARTIAL_GRAD,
            "model.layers.*.mlp.dense_h_to_4h": COLWISE,
            "model.layers.*.mlp.dense_4h_to_h": ROWWISE,
        },
        {"num_heads": HEADS},
    ),
    "xglm": _decoder("model.layers.*", {"num_heads": HEADS, "embed_dim": WIDTH}),
}
"""model_type -> plan."""
