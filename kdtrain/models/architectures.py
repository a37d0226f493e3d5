"""Student architectures by name, as data. The vocabulary size always comes from the tokenizer.

Sizes with `miniplm` are those of Gu et al. 2025 (MiniPLM, arXiv 2410.17215, table of model configurations), which
follow Qwen1.5. `llama-5m` and `llama-20m` are kdtrain's own, for quick starts on a vocabulary of about 49 thousand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdtrain.errors import ConfigError


def _llama(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        **more,
    }


def _qwen2(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool = True) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": tied,
    }


def _qwen3(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama-5m": _llama(96, 256, 4, 4, 2),
    "llama-20m": _llama(256, 704, 8, 8, 4),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, initializer_range=0.041666666666666664),
    "qwen2-miniplm-104m": _qwen2(512, 1408, 8, 8),
    "qwen2-miniplm-200m": _qwen2(768, 2112, 12, 12),
    "qwen2-miniplm-300m": _qwen2(768, 2112, 18, 12),
    "qwen2-miniplm-500m": _qwen2(1024, 2816, 24, 16),
    # Only with an untied head does the parameter count match the name (1.16e9 parameters at 151,936 tokens).
    "qwen2-miniplm-1.2b": _qwen2(1536, 4224, 24, 16, tied=False),
    "qwen3-0.6b": _qwen3(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": _qwen3(2048, 6144, 28, 16, 8),
    "pythia-70m": {
        "model_type": "gpt_neox",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": False,
    },
}
"""Name -> Hugging Face config dict without vocab_size and special tokens."""


def read_architecture(name_or_path: str, vocab_size: int) -> dict[str, Any]:
    """The Hugging Face config dict of a named architecture, or of a folder or file with a config.json.

    vocab_size replaces the value in the source. Special token ids are dropped because they belong to a tokenizer.
    Raises ConfigError for an unknown name, a missing or unreadable file, or one without a model_type.
    """
    known = ARCHITECTURES.get(name_or_path)
    config = read_config_json(name_or_path) if known is None else dict(known)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        config[key] = None
    config.pop("architectures", None)
    return {**config, "vocab_size": vocab_size}


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The content of `path` or `path`/config.json.

    Raises ConfigError when the file is missing or is not a model config.
    """
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise ConfigError(
            f"architecture {str(path)!r} is neither a known name nor a folder or file with a config.json\n"
            f"  known names: {', '.join(ARCHITECTURES)}\n"
            "  fix: check student.architecture for a misspelling, or give the path of a config.json"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}\n  fix: restore the file from its source") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ConfigError(
            f"{file} has no model_type, so it is not a Hugging Face model config\n  fix: give another file"
        )
    return config
