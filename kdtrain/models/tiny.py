"""Tiny random architectures for tests and demonstrations: a few thousand parameters, each with the structural features
of its family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}

TINY: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama"},
    "qwen2": {**_COMMON, "model_type": "qwen2"},
    "qwen3": {**_COMMON, "model_type": "qwen3", "head_dim": 8},
    # 9 query heads in 3 key/value groups, as SmolLM2-135M: tensor parallelism over 2 ranks is uneven.
    "smollm": {
        **_COMMON,
        "model_type": "llama",
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "pad_token_id": 2,
    },
    "gpt_neox": {
        **{key: value for key, value in _COMMON.items() if key != "num_key_value_heads"},
        "model_type": "gpt_neox",
        "num_attention_heads": 4,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    # Scaled embedding, soft-capped logits, q_norm and k_norm; tied by default.
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "head_dim": 8,
        "sliding_window": 16,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
    },
    # Conv1D layers, whose weights are [in, out]; query, key and value in one; learned positions; tied by default.
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 101,
        "n_embd": 32,
        "n_inner": 44,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    },
    # Query, key and value in one, gate and up in one.
    "phi3": {**_COMMON, "model_type": "phi3"},
    # q_norm and k_norm over all heads at once.
    "olmo2": {**_COMMON, "model_type": "olmo2"},
}
"""Name -> Hugging Face config dict. 101 tokens and 44 MLP features are divisible by neither 3 nor 8."""


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """A copy of a tiny config with some keys changed, e.g. tie_word_embeddings=True. KeyError for unknown names."""
    return {**TINY[name], **changes}


def save_random(
    folder: Path, config: dict[str, Any], *, seed: int = 3, base: bool = False, shard_size: str = "1GB"
) -> Path:
    """Write a Hugging Face folder with a model of `config`, initialised from `seed`, in float32; returns `folder`.

    base: write the model without its head, as `AutoModel` saves it. shard_size: largest size of a file.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = AutoConfig.for_model(settings.pop("model_type"), **settings)
        model = AutoModelForCausalLM.from_config(built, dtype=torch.float32)  # type: ignore[no-untyped-call]
    (model.base_model if base else model).save_pretrained(folder, max_shard_size=shard_size)
    return folder
