"""Tiny random mixtures of experts, one per kind supported as teacher, and their folders in both published forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.models.tiny import tiny_config

_FEW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
_LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
_GROUPED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 20}
_LATENT = {
    "num_key_value_heads": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    },
    # Features are sharded in units of eight so that rows are multiples of 16 bytes: 40 are cut unevenly over 2 and 4
    # ranks.
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "head_dim": 8},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {**_GROUPED, "head_dim": 8, "n_group": 1, "topk_group": 1, "use_qk_norm": True},
    "deepseek_v3": {**_GROUPED, **_LATENT, "n_group": 2, "topk_group": 1},
    "gpt_oss": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "cohere2_moe": {"num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v2": {**_GROUPED, **_LATENT, "n_group": 2, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {**_GROUPED, "head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "exaone_moe": {**_FEW, "num_experts": 6, "first_k_dense_replace": 1},
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe_lite": {**_GROUPED, **_LATENT, "n_group": 1, "topk_group": 1},
    "granitemoe": _LOCAL,
    "granitemoeshared": {**_LOCAL, "shared_intermediate_size": 24},
    "hy_v3": {**_FEW, "num_experts": 6},
    "mimo_v2_flash": {**_FEW, "n_routed_experts": 6},
    "phimoe": _LOCAL,
    "solar_open": {**_FEW, "n_routed_experts": 6},
}
"""model_type -> settings beside the common ones of `kdtrain.models.tiny`."""


def mixture_config(kind: str, **changes: Any) -> dict[str, Any]:
    """Content of a config.json of a tiny mixture. KeyError for a kind that is not in MIXTURES."""
    return {**tiny_config("llama"), "model_type": kind, **MIXTURES[kind], **changes}


def write_mixture(folder: Path, kind: str, *, packed: bool, seed: int = 3, **changes: Any) -> Any:
    """Write a tiny model's folder in several files and return the model, in float32. No parameter is exactly zero or
    one.

    packed: experts in 3-D tensors as transformers 5 holds them; else one tensor per expert, as published.
    """
    settings = mixture_config(kind, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-untyped-call]
        for _, tensor in sorted(model.state_dict().items()):  # buffers too: some are added to a router's scores
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
    model.save_pretrained(folder, max_shard_size="30KB", save_original_format=not packed)
    return model
