"""From a checkpoint to a Hugging Face folder, without DeepSpeed and without a process group."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.models.export import export_hf, recover_folder

MODEL_FOLDER = "model"
"""Inside a run folder: the tokenizer of the student, and the generation_config.json it came with."""

GENERATION = "generation_config.json"
"""Where a model's folder says, among other things, at which tokens generation stops."""

ORIGIN_FILE = "kdtrain.json"
"""Inside an export: which checkpoint it is."""


def write_model_files(run_folder: Path, tokenizer_dir: Path, weights: str | None = None) -> None:
    """Keep next to the checkpoints what an export needs besides them. Each file is replaced whole.

    That is the tokenizer and, for a student that began as the model folder `weights`, its generation_config.json.
    """
    folder = run_folder / MODEL_FOLDER
    folder.mkdir(exist_ok=True)
    files = [path for path in sorted(tokenizer_dir.iterdir()) if path.is_file()]
    if weights is not None and (Path(weights) / GENERATION).is_file():
        files.append(Path(weights) / GENERATION)
    for source in files:
        temporary = folder / f".{source.name}.writing"
        shutil.copy2(source, temporary)
        os.replace(temporary, folder / source.name)


def export_checkpoint(source: Path, output: Path, *, dtype: str, replace: bool = False) -> Path:
    """Write the Hugging Face folder `output` from a run folder's newest checkpoint, or from one checkpoint folder.

    dtype: "float32" or "bfloat16". replace: an export of an older checkpoint may be replaced; one of the same
    checkpoint is left as it is. Needs neither DeepSpeed nor a process group; one parameter is in memory at a time.
    Raises CheckpointError when `source` holds no complete checkpoint, ConfigError when `output` exists already.
    """
    source = Path(os.path.realpath(source))  # unlike resolve() it takes a loop of links for a path that is not there
    is_checkpoint = (source / "checkpoint.json").is_file()
    folder = source if is_checkpoint else checkpoint.find_latest(source / "checkpoints")
    if folder is None:
        raise CheckpointError(
            f"{source} holds no complete checkpoint\n"
            "  fix: give a run folder that has checkpoints/step_NNNNNN, or such a folder itself"
        )
    tokenizer = (folder.parent.parent if is_checkpoint else source) / MODEL_FOLDER
    if not tokenizer.is_dir():
        raise CheckpointError(
            f"{tokenizer} is missing\n  why: a run keeps its student's tokenizer there\n"
            "  fix: put the tokenizer's files there"
        )
    about: dict[str, Any] = {
        "step": checkpoint.step_of(folder),
        "checkpoint": checkpoint.identity(folder),
        "dtype": dtype,
    }
    if (origin := checkpoint.read_state(folder).get("origin") or {}).get("is_stage"):
        about["continued_from"] = origin
    recover_folder(output)
    if output.exists():
        if not replace or _origin(output) is None:
            raise ConfigError(f"{output} exists already\n  fix: name a new folder, or remove this one")
        if _origin(output) == about:
            return output
    kind = torch.float32 if dtype == "float32" else torch.bfloat16
    weights, config = checkpoint.read_full_parameters(folder), checkpoint.read_config(folder)
    notes = {ORIGIN_FILE: json.dumps(about) + "\n"}
    if (tokenizer / GENERATION).is_file():
        notes[GENERATION] = (tokenizer / GENERATION).read_text(encoding="utf-8")
    return export_hf(weights, config, output, dtype=kind, tokenizer_dir=tokenizer, notes=notes)


def _origin(output: Path) -> dict[str, Any] | None:
    """What ORIGIN_FILE of an export says; None for a folder that kdtrain did not write."""
    path = output / ORIGIN_FILE
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found
