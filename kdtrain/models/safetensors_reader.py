"""Read slices of a Hugging Face folder's safetensors by the names a model uses now, counting what was read."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.models.experts import PerExpert, group_experts
from kdtrain.models.ties import tied_names

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
COMPARED_ROWS = 8192
"""Rows of two tensors that are in memory at a time while they are compared."""


class SafetensorsFolder:
    """The tensors of a folder under the parameter names of `model`. A context manager; opens files on first use.

    elements_read counts the elements handed out. Raises ConfigError when the folder has no complete safetensors.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self.elements_read = 0
        self._model = model
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        self._used: set[str] = set()
        self._place, self._grouped = self._find_tensors()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...], dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim` of the tensor `name`, whose full shape must be `shape`.

        Everything by default. Raises ConfigError when the file has no such tensor or it has another shape.
        """
        if stop is None:
            stop = shape[dim] if shape else 1
        if name in self._grouped:
            self._used.add(name)
            return self._grouped[name].read(self._slice, shape, dim, start, stop)
        if name not in self._place:
            raise ConfigError(
                f"{self.folder} has no tensor for parameter {name!r}\n"
                "  why: config.json and the weights belong to different models, or the download is incomplete\n"
                "  fix: fetch the folder again"
            )
        self._used.add(name)
        index = (*(slice(None),) * dim, slice(start, stop)) if shape else ...  # of a number, e.g. Apertus' beta
        return self._slice(self._place[name], shape, index)

    def _slice(self, place: tuple[str, str], shape: tuple[int, ...], index: tuple[slice, ...] | EllipsisType) -> Tensor:
        file, key = place
        view = self._reader(file).get_slice(key)
        found = tuple(view.get_shape())
        if found != tuple(shape):
            raise ConfigError(
                f"{self.folder / file}: tensor {key!r} has shape {found}, the model needs {tuple(shape)}\n"
                "  why: config.json and the weights belong to different models\n"
                "  fix: fetch the folder again"
            )
        value: Tensor = view[index]
        self.elements_read += value.numel()
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, compared COMPARED_ROWS rows at a time; not counted as read."""
        one, two = (self._reader(self._place[key][0]).get_slice(self._place[key][1]) for key in (name, other))
        if one.get_shape() != two.get_shape():
            return False
        starts = range(0, one.get_shape()[0], COMPARED_ROWS)
        return all(torch.equal(one[i : i + COMPARED_ROWS], two[i : i + COMPARED_ROWS]) for i in starts)

    def report_unused(self) -> None:
        """Warn about tensors the model has no place for, except those its class says are harmless."""
        harmless = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or []
        tied = tied_names(self._model)
        extra = [
            name
            for name in self._place
            if name not in self._used
            and name not in tied
            and not name.endswith("rotary_emb.inv_freq")
            and not any(re.search(pattern, name) for pattern in harmless)
        ]
        if extra:
            LOGGER.warning("%s: %d tensors have no place in the model: %s", self.folder, len(extra), extra[:5])

    def _reader(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ConfigError(
                    f"{self.folder / file} cannot be read: {error}\n"
                    "  why: the file is damaged or cut off\n"
                    "  fix: fetch it again"
                ) from error
        return self._open[file]

    def _find_tensors(self) -> tuple[dict[str, tuple[str, str]], dict[str, PerExpert]]:
        """Model parameter name -> (file, name in the file), and names of parameters made of experts' tensors."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise ConfigError(f"{index} is damaged: {error}\n  fix: fetch the file again") from error
            missing = sorted({file for file in weight_map.values() if not (self.folder / file).is_file()})
            if missing:
                raise ConfigError(f"{self.folder} lacks {missing}, named by {INDEX}\n  fix: fetch the missing files")
            keys = list(weight_map.items())
        elif (self.folder / SINGLE).is_file():
            keys = [(key, SINGLE) for key in sorted(self._reader(SINGLE).keys())]
        else:
            raise ConfigError(self._nothing_found())
        transforms = get_model_conversion_mapping(self._model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        return group_experts(self._model, ((_rename(key, renamings), (file, key)) for key, file in keys), converters)

    def _nothing_found(self) -> str:
        pickles = sorted(path.name for path in self.folder.glob("*.bin"))
        found = f"only {pickles}" if pickles else "none"
        return (
            f"{self.folder} has no {SINGLE} and no {INDEX} ({found})\n"
            "  why: kdtrain reads slices of safetensors, and pickled files can run code when opened\n"
            "  fix: convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )


def _rename(key: str, renamings: list[WeightRenaming]) -> str:
    for renaming in renamings:
        key, _ = renaming.rename_source_key(key)
    return key
