"""Export of a checkpoint to a Hugging Face folder: `launch/export_hf.py` and the end of a run.

Needs neither DeepSpeed nor a process group.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from kdtrain.data.loader import sequence_prefix_of
from kdtrain.data.tokenizer import vocab_size
from kdtrain.engine import checkpoint
from kdtrain.errors import CheckpointError, ConfigError
from kdtrain.files import TOKENIZER_FILES
from kdtrain.models.export import SPECIAL_IDS, export_hf, ids_within
from kdtrain.models.special_tokens import read_json
from kdtrain.stores.folders import recover_folder
from kdtrain.training.run_files import CHECKPOINTS, MODEL, VOCAB_SIZE

GENERATION = "generation_config.json"
"""In a model folder: settings of generation, among them the ids that end it."""

ORIGIN_FILE = "kdtrain.json"
"""Inside an export: the identity of its checkpoint, and the ids that began every sequence of its run."""


def model_files(tokenizer_dir: Path, weights: str | None = None) -> list[Path]:
    """Files that an export needs besides a checkpoint: the student's tokenizer and its generation_config.json.

    A student that started from the model folder `weights` keeps that folder's tokenizer, with chat template and special
    tokens, and generation_config.json, if they exist; otherwise it gets `tokenizer_dir`, the tokenizer of the data.
    Raises ConfigError if a file that the export reads is not JSON: else the export would fail after all the training.
    """
    own = None if weights is None else Path(weights)
    source = own if own is not None and (own / "tokenizer.json").is_file() else tokenizer_dir
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if own is not None and (own / GENERATION).is_file():
        files.append(own / GENERATION)
    for file in files:
        if file.name in (GENERATION, "tokenizer_config.json", "special_tokens_map.json"):
            read_json(file)
    return files


def write_model_files(run_folder: Path, tokenizer_dir: Path, weights: str | None = None) -> None:
    """Copy `model_files` into the run folder, each by an atomic replace; raises as `model_files`.

    Files of these names that an earlier start of the run left are removed.
    """
    files, folder = model_files(tokenizer_dir, weights), run_folder / MODEL
    folder.mkdir(exist_ok=True)
    for file in files:
        temporary = folder / f".{file.name}.writing"
        shutil.copy2(file, temporary)
        os.replace(temporary, folder / file.name)
    for name in {*TOKENIZER_FILES, GENERATION} - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)


def export_checkpoint(source: Path, output: Path, *, dtype: str | None = None, replace: bool = False) -> Path:
    """Write the Hugging Face folder `output` from a checkpoint folder, or from the newest one of a run folder.

    dtype: "float32" or "bfloat16"; None: the student's in its run. replace: replace an export of another checkpoint;
    one of the same checkpoint is left unchanged. One parameter is in memory at a time.
    Raises CheckpointError if `source` holds no complete checkpoint, ConfigError if `output` exists and may not be
    replaced.
    """
    source = Path(os.path.realpath(source))  # unlike resolve(), no error for a loop of links: the path is then missing
    is_checkpoint = (source / "checkpoint.json").is_file()
    folder = source if is_checkpoint else checkpoint.find_latest(source / CHECKPOINTS)
    if folder is None:
        raise CheckpointError(
            f"{source} holds no complete checkpoint\n"
            "  fix: give a run folder that has checkpoints/step_NNNNNN, or such a folder itself"
        )
    tokenizer = (folder.parent.parent if is_checkpoint else source) / MODEL
    if not tokenizer.is_dir():
        raise CheckpointError(
            f"{tokenizer} is missing\n  why: a run keeps its student's tokenizer there\n"
            "  fix: put the tokenizer's files there"
        )
    dtype = checkpoint.read_dtype(folder) if dtype is None else dtype
    about: dict[str, Any] = {
        "step": checkpoint.step_of(folder),
        "checkpoint": checkpoint.identity(folder),
        "dtype": dtype,
        "sequence_prefix": list(stored_prefix(folder)),
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
    notes, size = {ORIGIN_FILE: json.dumps(about) + "\n"}, _softmax_size(folder, tokenizer)
    if (tokenizer / GENERATION).is_file():
        notes[GENERATION] = _generation_text(tokenizer / GENERATION, size)
    return export_hf(weights, config, output, dtype=kind, tokenizer_dir=tokenizer, notes=notes, vocab_size=size)


def _softmax_size(folder: Path, tokenizer: Path) -> int | None:
    """Number of ids of the softmax of checkpoint `folder`; None if neither its state nor a tokenizer.json has it."""
    found: int | None = checkpoint.read_state(folder).get(VOCAB_SIZE)
    if found is None and (tokenizer / "tokenizer.json").is_file():  # a checkpoint written before the size was recorded
        return vocab_size(tokenizer)
    return found


def _generation_text(file: Path, size: int | None) -> str:
    """The text of `file`, unchanged unless it names ids that have no row; these are removed."""
    text, settings = file.read_text(encoding="utf-8"), read_json(file)
    special = {key: settings[key] for key in SPECIAL_IDS if key in settings}
    kept = special if size is None else ids_within(special, size)
    return text if kept == special else json.dumps({**settings, **kept}, indent=2) + "\n"


def stored_prefix(folder: Path) -> tuple[int, ...]:
    """The sequence prefix of the run that wrote checkpoint `folder`. Raises CheckpointError."""
    return sequence_prefix_of(checkpoint.read_state(folder).get("loader", {}))


def exported_prefix(weights: Path) -> tuple[int, ...] | None:
    """The sequence prefix that the exported student `weights` was trained with; None for a folder not of kdtrain.

    Raises ConfigError if ORIGIN_FILE is damaged.
    """
    try:
        about = _origin(weights)
    except ValueError as error:
        raise ConfigError(
            f"{weights / ORIGIN_FILE} is damaged: {error}\n  fix: export the student again, or remove the file"
        ) from error
    return None if about is None else sequence_prefix_of(about)


def _origin(output: Path) -> dict[str, Any] | None:
    """The content of ORIGIN_FILE of an export; None for a folder that kdtrain did not write."""
    path = output / ORIGIN_FILE
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found
