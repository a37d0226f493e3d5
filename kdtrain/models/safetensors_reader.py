"""Read slices of a Hugging Face folder's safetensors by the model's current parameter names, counting elements read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from kdtrain.errors import ConfigError
from kdtrain.models.experts import PerExpert, group_experts
from kdtrain.models.ties import kept_name, tied_names
from kdtrain.models.weight_files import Place, WeightFiles


class SafetensorsFolder:
    """The tensors of a folder under the parameter names of `model`. A context manager; opens every file.

    Names are resolved as in transformers: its renamings first, then the base model's prefix added or removed. place:
    location of every tensor that is not part of a packed parameter, by the model's name, or by its own name if the
    model has no such parameter. grouped: parameters that consist of several tensors. elements_read counts the elements
    returned. Raises ConfigError as `WeightFiles`, and when two different tensors are meant for one parameter.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        self.folder = folder
        self.elements_read = 0
        self.files = WeightFiles(folder, getattr(model.config, "transformers_weights", None))
        try:
            self.place, self.grouped = self._find_tensors(model)
        except BaseException:
            self.files.close()
            raise

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.files.close()

    def read(self, name: str, shape: tuple[int, ...], dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) along `dim` of the tensor `name`, whose full shape must be `shape`.

        Everything by default. Raises ConfigError when the files have no such tensor or it has another shape.
        `kdtrain.models.stored_weights` checks that its dtype is one of ordinary weights.
        """
        end = (shape[dim] if shape else 0) if stop is None else stop
        if name in self.grouped:
            return self.grouped[name].read(self._slice, shape, dim, start, end)
        if name not in self.place:
            raise ConfigError(
                f"{self.folder} has no tensor for parameter {name!r}\n"
                "  why: config.json and the weights belong to different models, or the download is incomplete\n"
                "  fix: fetch the folder again"
            )
        return self._slice(self.place[name], shape, (slice(None),) * dim + (slice(start, end),) if shape else ())

    def check_shape(self, place: Place, shape: tuple[int, ...]) -> None:
        """Raise ConfigError unless the tensor has `shape`, by its file's header."""
        file, key = place
        if (found := self.files.shape(place)) != tuple(shape):
            raise ConfigError(
                f"{self.folder / file}: tensor {key!r} has shape {found}, the model needs {tuple(shape)}\n"
                "  why: config.json and the weights belong to different models\n"
                "  fix: fetch the folder again"
            )

    def _slice(self, place: Place, shape: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
        self.check_shape(place, shape)
        value: Tensor = self.files.view(place)[index or ...]
        self.elements_read += value.numel()
        return value

    def _find_tensors(self, model: Any) -> tuple[dict[str, Place], dict[str, PerExpert]]:
        transforms = get_model_conversion_mapping(model)
        renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, WeightConverter)]
        place, grouped = group_experts(self._named(model, renamings, converters), converters)
        for name in place.keys() & grouped.keys():
            raise _twins(self.folder, name, place[name], grouped[name].places[0][0])
        for second, kept in sorted(tied_names(model).items()):
            # a file may keep either name of tied weights
            if second in place and kept not in place and kept_name(model, second) == kept:
                place[kept] = place[second]
        return place, grouped

    def _named(
        self, model: Any, renamings: list[WeightRenaming], converters: list[WeightConverter]
    ) -> Iterator[tuple[str, str | None, Place]]:
        """(the model's name, pattern of the converter that applies, place) of every tensor, as transformers finds it.

        A tensor keeps its name if the renamed one is unknown to the model and the original is not.
        """
        known: dict[str, Any] = dict.fromkeys(model.state_dict(), True)
        prefix, first = model.base_model_prefix, dict[str, Place]()
        for place in self.files.places:
            key = place[1]
            name, pattern = rename_source_key(key, renamings, converters, prefix, known)
            if name not in known and key in known:
                name, pattern = rename_source_key(key, [], [], prefix, known)
            if name not in known:
                name, pattern = key, None
            if pattern is None and (other := first.setdefault(name, place)) != place:
                if not self.files.equal(other, place):
                    raise _twins(self.folder, name, other, place)
                continue
            yield name, pattern, place


def _twins(folder: Path, name: str, one: Place, other: Place) -> ConfigError:
    return ConfigError(
        f"{folder} has two different tensors for parameter {name!r}: {one[1]!r} in {one[0]} and {other[1]!r} in "
        f"{other[0]}\n  why: files of different models, or of two ways of writing one, have been mixed\n"
        "  fix: fetch the folder again"
    )
