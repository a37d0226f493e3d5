"""A run small enough to be started, killed and resumed in seconds: its models, its data and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdtrain.files import write_atomic
from kdtrain.models.tiny import save_random
from tests.support.tiny_data import random_documents, write_store, write_tokenizer

TOKENS_PER_STEP = 128


def write_run(
    folder: Path,
    *,
    student: dict[str, Any],
    teacher: dict[str, Any] | None = None,
    num_documents: int = 400,
    steps: int,
    **sections: dict[str, Any],
) -> Path:
    """folder/config.yaml, written last, and all it names; runs go to folder/runs.

    student: a Hugging Face config. teacher: likewise; None: the student is pre-trained alone. sections: settings to add
    or change, by section.
    """
    tokenizer = write_tokenizer(folder / "teacher", eos="<|endoftext|>")
    write_store(folder / "store", random_documents(num_documents, seed=0), tokenizer)
    (folder / "student.json").write_text(json.dumps(student))
    settings: dict[str, Any] = {
        "run": {"output_dir": str(folder / "runs")},
        "student": {"architecture": str(folder / "student.json"), "dtype": "float32"},
        "data": {
            "train": [str(folder / "store")],
            "seq_len": 16,
            "tokens_per_step": TOKENS_PER_STEP,
            "sequences_per_micro_batch": 4,
        },
        "objective": {"name": "pretrain"},
        "train": {"total_tokens": steps * TOKENS_PER_STEP, "slab_bytes": 1 << 20},
        "schedule": {"warmup_tokens": 2 * TOKENS_PER_STEP},
        "checkpoint": {"every_steps": 1, "export": False},
        "log": {"every_steps": 1},
        "debug": {"self_check": False},
    }
    if teacher is not None:
        save_random(tokenizer, {**teacher, "vocab_size": 257})
        settings["teacher"] = {"weights": str(tokenizer), "dtype": "float32"}
        settings["objective"] = {"name": "distill", "distill": {"kd_weight": 0.7, "temperature": 2.0}}
    for name, changes in sections.items():
        settings[name] = {**settings.get(name, {}), **changes}
    write_atomic(folder / "config.yaml", json.dumps(settings, indent=1))  # JSON is YAML
    return folder / "config.yaml"
