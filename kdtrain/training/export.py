"""From a checkpoint to a Hugging Face folder, without DeepSpeed and without a process group."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.models.export import export_hf

MODEL_FOLDER = "model"
"""Inside a run folder: config.json and the tokenizer of the student, written when the run starts."""


def write_model_files(run_folder: Path, config_json: str, tokenizer_dir: Path) -> None:
    """Keep next to the checkpoints what an export needs besides weights: architecture and tokenizer."""
    folder = run_folder / MODEL_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config_json, encoding="utf-8")
    for source in sorted(tokenizer_dir.iterdir()):
        if source.is_file():
            shutil.copy2(source, folder / source.name)


def export_checkpoint(source: Path, output: Path, *, dtype: str) -> Path:
    """Write the Hugging Face folder `output` from a run folder's newest checkpoint, or from one checkpoint folder.

    dtype: "float32" or "bfloat16". Needs neither DeepSpeed nor a process group; one parameter is in memory at a time.
    Raises CheckpointError when `source` holds no complete checkpoint, ConfigError when `output` exists already.
    """
    is_checkpoint = (source / "checkpoint.json").is_file()
    folder = source if is_checkpoint else checkpoint.find_latest(source / "checkpoints")
    if folder is None:
        raise CheckpointError(
            f"{source} holds no complete checkpoint\n"
            "  fix: give a run folder that has checkpoints/step_NNNNNN, or such a folder itself"
        )
    model_files = (folder.parent.parent if is_checkpoint else source) / MODEL_FOLDER
    if not (model_files / "config.json").is_file():
        raise CheckpointError(
            f"{model_files}/config.json is missing\n"
            "  why: a run keeps its student's architecture and tokenizer there\n"
            "  fix: put the student's config.json and tokenizer files there"
        )
    if output.exists():
        raise ConfigError(f"{output} exists already\n  fix: name a new folder, or remove this one")
    config = json.loads((model_files / "config.json").read_text(encoding="utf-8"))
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    return export_hf(checkpoint.read_full_parameters(folder), config, output, dtype=kind, tokenizer_dir=model_files)
