"""Write a trained model as an ordinary Hugging Face folder that needs no part of kdtrain to be read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.data.tokenizer import TOKENIZER_FILES
from kdtrain.errors import ConfigError
from kdtrain.files import is_running, sync
from kdtrain.log import LOGGER
from kdtrain.models.dtypes import dtypes_of
from kdtrain.models.load import parameters_on_meta
from kdtrain.models.special_tokens import special_token_ids
from kdtrain.models.ties import tied_names

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Settings of a config.json that belong to a tokenizer."""


def export_hf(
    full_state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: Any,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer_dir: str | Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write config, safetensors and tokenizer to `folder`, which appears complete or not at all; returns it.

    full_state: every full, unpadded parameter by its Hugging Face name, tied ones once or twice; tensors are cast one
    by one, so an iterator keeps memory low, to `dtype` or to what transformers keeps them in beside it. config: the
    model's Hugging Face config, or the content of its config.json; not changed. notes: further small files, name ->
    text. When the config names no special token at all, as that of a model trained from scratch, those of the tokenizer
    are written, and where generation stops.
    An existing `folder` is replaced. Call on one rank; does not communicate. Raises ConfigError when the state does
    not fit the config, or when `tokenizer_dir` holds no tokenizer.
    """
    folder = Path(folder)
    settings = dict(config) if isinstance(config, Mapping) else config.to_dict()
    tokenizer = [] if tokenizer_dir is None else tokenizer_files(tokenizer_dir)
    special: dict[str, int] = {}
    stops: list[int] = []
    if tokenizer_dir is not None and all(settings.get(key) is None for key in SPECIAL_IDS):
        special, stops = special_token_ids(tokenizer_dir)
    config = AutoConfig.for_model(settings.pop("model_type"), **{**settings, **special})
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    if stops:
        model.generation_config.eos_token_id = stops
    state = _checked_state(model, full_state)
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        for file in tokenizer:
            shutil.copyfile(file, temporary / file.name)
        for name, text in (notes or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return folder


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in `folder`. Raises ConfigError when there are none."""
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    if not found:
        raise ConfigError(
            f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES[:3])}, ...)\n"
            "  fix: give the folder of the tokenizer that prepared the data"
        )
    return found


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """A new empty folder beside `folder` that takes its place when the block ends well, and vanishes when it fails.

    Every file is flushed to disk before the name changes, so a crash leaves the old folder or the new one; if it comes
    between the two changes of names, under a hidden name that the next use, or `recover_folder`, changes back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    temporary = folder.with_name(f".{folder.name}.writing.{os.getpid()}")
    retired = folder.with_name(f".{folder.name}.old.{os.getpid()}")
    temporary.mkdir()
    try:
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            if path.is_file():
                path.chmod(0o644)  # safetensors writes files that only their owner can read
            sync(path)
        if folder.exists():
            os.rename(folder, retired)
        os.rename(temporary, folder)
        sync(folder.parent)
    finally:
        if retired.exists() and not folder.exists():
            os.rename(retired, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Undo what a killed `replacing_folder` left: the old folder gets its name back, half-written ones are removed.

    Only one process may be replacing `folder`. Leftovers of processes that live on this machine are not touched.
    """
    retired = [path for path in _leftovers(folder, "old") if not _is_alive(path)]
    if retired and not folder.exists():
        newest = max(retired, key=lambda path: path.stat().st_mtime)
        LOGGER.warning("%s is restored: a process was killed while it replaced it", folder)
        os.rename(newest, folder)
        retired.remove(newest)
    for path in (*retired, *(path for path in _leftovers(folder, "writing") if not _is_alive(path))):
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path, kind: str) -> list[Path]:
    prefix = f".{folder.name}.{kind}."
    found = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return [path for path in found if path.name.startswith(prefix) and path.name.removeprefix(prefix).isdigit()]


def _is_alive(leftover: Path) -> bool:
    """Whether another process with the id at the end of the name runs here; this one is not replacing it yet."""
    pid = int(leftover.name.rpartition(".")[2])
    return pid != os.getpid() and is_running(pid)


def _checked_state(model: Any, full_state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The state as `save_pretrained` wants it: `model`'s dtypes, contiguous, every parameter once; else ConfigError."""
    pairs = full_state.items() if isinstance(full_state, Mapping) else full_state
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    tied, dtypes = tied_names(model), dtypes_of(model)
    state: dict[str, Tensor] = {}
    for name, tensor in pairs:
        if shapes.get(name) != tuple(tensor.shape):
            raise ConfigError(
                f"cannot export {name!r} of shape {tuple(tensor.shape)}: the config wants {shapes.get(name, 'none')}\n"
                "  why: the weights and the config belong to different models\n  fix: check the checkpoint's origin"
            )
        if name not in tied:
            state[name] = tensor.detach().to("cpu", dtypes[name]).contiguous()
    missing = sorted(set(shapes) - set(tied) - set(state))
    if missing:
        raise ConfigError(
            f"cannot export: {len(missing)} parameters are missing, first {missing[:3]}\n"
            "  why: the state was gathered incompletely\n  fix: export from a complete checkpoint"
        )
    return state
