"""Write a trained model as an ordinary Hugging Face folder that can be read without kdtrain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.errors import ConfigError
from kdtrain.files import TOKENIZER_FILES
from kdtrain.log import LOGGER
from kdtrain.models.dtypes import dtypes_of
from kdtrain.models.special_tokens import read_json, special_token_ids
from kdtrain.models.stock import parameters_on_meta, stock_settings
from kdtrain.models.ties import tied_names
from kdtrain.stores.folders import replacing_folder

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
    vocab_size: int | None = None,
) -> Path:
    """Write config, safetensors and tokenizer to `folder`, which appears complete or not at all; returns it.

    full_state: every full, unpadded parameter by its Hugging Face name, tied ones once or twice; tensors are cast one
    by one (so an iterator keeps memory low) to `dtype`, or to float32 where transformers keeps them in float32. config:
    the model's Hugging Face config, or the content of its config.json; not changed. notes: further small files, name ->
    text. When the config names no special token at all, as that of a model trained from scratch, those of the tokenizer
    are written, and where generation stops. vocab_size: ids of the softmax that the model was trained with. Rows at or
    past it are dropped from embedding, head and its bias, because only rounding and z-loss determined their logits;
    special ids at or past it are dropped, too. None: all rows are written. Settings that refer to custom code
    (`kdtrain.models.stock`) are dropped. An existing `folder` is replaced. Call on one rank; does not communicate.
    Raises ConfigError when the state does not fit the config, or when `tokenizer_dir` holds no tokenizer.
    """
    folder = Path(folder)
    tokenizer = [] if tokenizer_dir is None else tokenizer_files(tokenizer_dir)
    given = stock_settings(config if isinstance(config, Mapping) else config.to_dict())
    config, stops, rows = _export_config(given, tokenizer_dir, vocab_size)
    with parameters_on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    if stops:
        model.generation_config.eos_token_id = stops
    state = _checked_state(model, _first_rows(full_state, model, rows, config.vocab_size))
    with replacing_folder(folder) as temporary:
        model.save_pretrained(temporary, state_dict=state)
        for file in tokenizer:
            _copy_tokenizer_file(file, temporary / file.name)
        for name, text in (notes or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
    return folder


def _export_config(
    settings: dict[str, Any], tokenizer_dir: str | Path | None, vocab_size: int | None
) -> tuple[Any, list[int], int]:
    """(config to write, ids that end generation if the tokenizer defines them, rows before trimming)."""
    special: dict[str, int] = {}
    stops: list[int] = []
    if tokenizer_dir is not None and all(settings.get(key) is None for key in SPECIAL_IDS):
        special, stops = special_token_ids(tokenizer_dir)
    config = AutoConfig.for_model(settings.pop("model_type"), **{**settings, **special})
    rows = int(config.vocab_size)
    kept = rows if vocab_size is None else min(rows, vocab_size)
    if kept < rows:
        LOGGER.info("export   %d of %d vocabulary rows: the softmax of the run ends there", kept, rows)
        config.vocab_size = kept
    if kept < rows or special:
        named = {key: getattr(config, key, None) for key in SPECIAL_IDS}
        for key, value in ids_within(named, kept).items():
            if value != named[key]:
                setattr(config, key, value)
    return config, [number for number in stops if number < kept], rows


def ids_within(special: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """Settings that hold ids of tokens, one or a list, without ids that have no row; None if none is left."""

    def keep(value: Any) -> Any:
        if isinstance(value, list):
            return [number for number in value if 0 <= number < rows] or None
        return value if value is None or 0 <= value < rows else None

    return {key: keep(value) for key, value in special.items()}


def _copy_tokenizer_file(source: Path, target: Path) -> None:
    """Copy byte for byte, except that references to custom code are removed from tokenizer_config.json."""
    shutil.copyfile(source, target)
    if source.name != "tokenizer_config.json":
        return
    settings = read_json(source)
    if settings.pop("auto_map", None) is not None:
        target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_files(folder: str | Path) -> list[Path]:
    """The tokenizer's files in `folder`. Raises ConfigError when there are none."""
    found = [Path(folder) / name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    if not found:
        raise ConfigError(
            f"{folder} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES[:3])}, ...)\n"
            "  fix: give the folder of the tokenizer that prepared the data"
        )
    return found


def _first_rows(
    full_state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], model: Any, rows: int, kept: int
) -> Iterator[tuple[str, Tensor]]:
    """The pairs of `full_state`; tensors of `rows` rows are cut to `kept` rows if `model` has only that many."""
    room = {name: param.shape[0] for name, param in model.named_parameters(remove_duplicate=False) if param.dim()}
    for name, tensor in full_state.items() if isinstance(full_state, Mapping) else full_state:
        is_cut = kept < rows and tensor.dim() > 0 and (tensor.shape[0], room.get(name)) == (rows, kept)
        yield name, tensor[:kept] if is_cut else tensor


def _checked_state(model: Any, pairs: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The state in the form that `save_pretrained` takes: `model`'s dtypes, contiguous, every parameter once.

    Raises ConfigError.
    """
    shapes = {name: tuple(param.shape) for name, param in model.named_parameters(remove_duplicate=False)}
    tied, dtypes = tied_names(model), dtypes_of(model)
    state: dict[str, Tensor] = {}
    for name, tensor in pairs:
        if shapes.get(name) != tuple(tensor.shape):
            raise ConfigError(
                f"cannot export {name!r} of shape {tuple(tensor.shape)}: the config needs {shapes.get(name, 'none')}\n"
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
