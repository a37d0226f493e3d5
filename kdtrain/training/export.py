"""From a checkpoint to a Hugging Face folder, without DeepSpeed and without a process group."""

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

MODEL_FOLDER = "model"
"""Inside a run folder: the tokenizer of the student, and the generation_config.json it came with."""

VOCAB_SIZE = "vocab_size"
"""In a checkpoint's state: ids of the softmax that the run trains; rows past it are not exported."""

GENERATION = "generation_config.json"
"""Where a model's folder says, among other things, at which tokens generation stops."""

ORIGIN_FILE = "kdtrain.json"
"""Inside an export: which checkpoint it is, and the ids that began every sequence of its run."""


def model_files(tokenizer_dir: Path, weights: str | None = None) -> list[Path]:
    """The files that an export needs besides checkpoints: of the student's tokenizer, and its generation_config.json.

    A student that began as the model folder `weights` keeps its own tokenizer, with chat template and special tokens,
    and its generation_config.json, where that folder has them. Else it gets `tokenizer_dir`, the tokenizer of the data.
    ConfigError for one of those an export reads that is no JSON: it would fail after all the training.
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
    """Keep `model_files` next to the checkpoints, each replaced whole; raises as it does.

    Files of these names that an earlier version of the run left are removed.
    """
    files, folder = model_files(tokenizer_dir, weights), run_folder / MODEL_FOLDER
    folder.mkdir(exist_ok=True)
    for file in files:
        temporary = folder / f".{file.name}.writing"
        shutil.copy2(file, temporary)
        os.replace(temporary, folder / file.name)
    for name in {*TOKENIZER_FILES, GENERATION} - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)


def export_checkpoint(source: Path, output: Path, *, dtype: str | None = None, replace: bool = False) -> Path:
    """Write the Hugging Face folder `output` from a run folder's newest checkpoint, or from one checkpoint folder.

    dtype: "float32" or "bfloat16"; None: the student's in its run. replace: an export of an older checkpoint may be
    replaced; one of the same checkpoint is left as it is. Needs neither DeepSpeed nor a process group; one parameter
    is in memory at a time.
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
    """Ids that the run of checkpoint `folder` trained; None where neither it nor a tokenizer.json says."""
    found: int | None = checkpoint.read_state(folder).get(VOCAB_SIZE)
    if found is None and (tokenizer / "tokenizer.json").is_file():  # a checkpoint of before it was recorded
        return vocab_size(tokenizer)
    return found


def _generation_text(file: Path, size: int | None) -> str:
    """What `file` says, byte for byte unless it names ids that have no row."""
    text, settings = file.read_text(encoding="utf-8"), read_json(file)
    special = {key: settings[key] for key in SPECIAL_IDS if key in settings}
    kept = special if size is None else ids_within(special, size)
    return text if kept == special else json.dumps({**settings, **kept}, indent=2) + "\n"


def stored_prefix(folder: Path) -> tuple[int, ...]:
    """The ids that begin every sequence of the run that wrote the checkpoint `folder`. Raises CheckpointError."""
    return sequence_prefix_of(checkpoint.read_state(folder).get("loader", {}))


def exported_prefix(weights: Path) -> tuple[int, ...] | None:
    """The ids that began every sequence the student `weights` was trained on; None for a folder not of kdtrain.

    Raises ConfigError if the folder's note is damaged.
    """
    try:
        about = _origin(weights)
    except ValueError as error:
        raise ConfigError(
            f"{weights / ORIGIN_FILE} is damaged: {error}\n  fix: export the student again, or remove the file"
        ) from error
    return None if about is None else sequence_prefix_of(about)


def _origin(output: Path) -> dict[str, Any] | None:
    """What ORIGIN_FILE of an export says; None for a folder that kdtrain did not write."""
    path = output / ORIGIN_FILE
    found: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found
