"""Parameters, FLOPs per token and peak FLOP/s of devices, from which model FLOPs utilisation (MFU) is computed."""

from __future__ import annotations

import re
from typing import Any

# Dense bf16 tensor-core peak in FLOP/s, without sparsity, from the vendor's data sheet named beside it.
PEAK_BF16_FLOPS: dict[str, float] = {
    "A100": 312e12,  # NVIDIA A100 Tensor Core GPU data sheet (2021)
    "A10": 125e12,  # NVIDIA A10 data sheet (2021)
    "L4": 121e12,  # NVIDIA L4 data sheet (2023): 242 with sparsity
    "L40": 181e12,  # NVIDIA L40 data sheet (2023): 362 with sparsity
    "L40S": 362e12,  # NVIDIA L40S data sheet (2023): 733 with sparsity, halved and rounded down
    "H100 NVL": 835e12,  # NVIDIA H100 NVL data sheet (2024): 1671 with sparsity
    "H100 PCIe": 756e12,  # NVIDIA H100 data sheet (2023): 1513 with sparsity
    "H100": 989e12,  # NVIDIA H100 SXM data sheet (2023): 1979 with sparsity
    "H200 NVL": 835e12,  # NVIDIA H200 data sheet (2024): 1671 with sparsity
    "H200": 989e12,  # NVIDIA H200 data sheet (2024): 1979 with sparsity
    "GH200": 989e12,  # NVIDIA GH200 data sheet (2023)
    "B200": 2250e12,  # NVIDIA DGX B200 data sheet (2024): 36 PFLOP/s with sparsity for eight
    "MI250X": 383e12,  # AMD Instinct MI250X data sheet (2021)
    "MI300X": 1307e12,  # AMD Instinct MI300X data sheet (2023)
}
"""Part of a device's name -> dense bfloat16 FLOP/s of one device."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device by the name torch reports, e.g. "NVIDIA H200"; None if it is not in the table."""
    matches = [key for key in PEAK_BF16_FLOPS if re.search(rf"(?<!\w){key}(?!\w)", device_name, re.IGNORECASE)]
    return PEAK_BF16_FLOPS[max(matches, key=len)] if matches else None


def matmul_parameters(config: Any, num_parameters: int) -> int:
    """Parameters that take part in a matrix product: all of them, but an embedding only if it is also the head.

    num_parameters counts a tied weight once.
    """
    embedding = config.vocab_size * config.hidden_size
    return num_parameters if config.tie_word_embeddings else num_parameters - embedding


def forward_flops_per_token(config: Any, num_parameters: int, seq_len: int) -> float:
    """FLOPs of one token of a full sequence of seq_len tokens in a forward pass: 2 N + 2 L S A.

    N: `matmul_parameters`; L layers; A: query heads x head_dim. Two FLOPs per multiply-add (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). Attention: scores and their use are two products of 2 S A each, halved because
    attention is causal. Packing, which shortens attention, is not counted.
    """
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads * head_dim
    attention = 2.0 * float(config.num_hidden_layers * seq_len * width)
    return 2.0 * matmul_parameters(config, num_parameters) + attention


def training_flops_per_token(config: Any, num_parameters: int, seq_len: int) -> float:
    """Forward and backward: three times the forward, 6 N + 6 L S A.

    Recomputed activations are not counted, so utilisation is of the model, not of the hardware.
    """
    return 3.0 * forward_flops_per_token(config, num_parameters, seq_len)


def mfu(tokens_per_s: float, flops_per_token: float, num_devices: int, device_name: str) -> float | None:
    """Model FLOPs as a share of the devices' peak; None for a device whose peak is unknown."""
    peak = peak_flops(device_name)
    return None if peak is None else tokens_per_s * flops_per_token / (peak * num_devices)
