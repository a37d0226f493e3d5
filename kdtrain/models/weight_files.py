"""Which files of a Hugging Face folder hold its weights, and their tensors: names, shapes, dtypes, slices.

The files are those that transformers 5.23 reads without a variant, in its order of precedence: the file named by
`transformers_weights` in config.json, else model.safetensors, else the files named by model.safetensors.index.json. As
in transformers, a set of shards provides every tensor in its files. Two cases are handled differently, because
transformers reads the wrong weights without an error:

- If a folder holds model.safetensors and a set of shards, transformers reads the former, whichever is newer. Saving in
  several files leaves an old model.safetensors there, and saving in one file leaves an old index; other tools read the
  index first. A folder that holds both is read if they agree, tensor by tensor, and refused if not.
- An index that contradicts its files is refused. transformers ignores where it places a tensor, and initialises at
  random what is missing.

`metadata.total_size` of an index is not compared: converters write it by rules of their own (with or without tied
weights, of another dtype), while a file that was cut off is recognised by its own header.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
ADAPTER = "adapter_config.json"
COMPARED_ROWS = 8192
"""Rows of two tensors held in memory at a time during a comparison."""

Place = tuple[str, str]
"""(file, name in the file) of a tensor."""


class WeightFiles:
    """The tensors of the weight files of `folder`, by (file, name in the file). A context manager.

    named: `transformers_weights` of config.json. Opens every file and reads its header. Raises ConfigError, naming the
    files, when there is none, when one is missing or cut off, or when two contradict each other.
    """

    def __init__(self, folder: Path, named: str | None = None) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._open: dict[str, Any] = {}
        try:
            self.places = self._find(named)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def view(self, place: Place) -> Any:
        """safetensors' slice of a tensor: get_shape(), get_dtype() and [index]."""
        file, key = place
        return self._reader(file).get_slice(key)

    def shape(self, place: Place) -> tuple[int, ...]:
        """Shape of a tensor, from the file's header."""
        return tuple(self.view(place).get_shape())

    def dtype(self, place: Place) -> str:
        """Dtype under which a tensor is stored, as safetensors spells it: F32, BF16, F8_E4M3, I8, ...; from the
        header."""
        return str(self.view(place).get_dtype())

    def equal(self, one: Place, other: Place) -> bool:
        """Whether two tensors have one shape and dtype and the same numbers. Reads COMPARED_ROWS rows at a time."""
        if (self.shape(one), self.dtype(one)) != (self.shape(other), self.dtype(other)):
            return False
        mine, theirs, shape = self.view(one), self.view(other), self.shape(one)
        parts = [slice(i, i + COMPARED_ROWS) for i in range(0, shape[0], COMPARED_ROWS)] if shape else [...]
        return all(torch.equal(_comparable(mine[part]), _comparable(theirs[part])) for part in parts)

    def _find(self, named: str | None) -> list[Place]:
        self._refuse_other_layers()
        if named is not None:
            return self._named(named)
        index = self.folder / INDEX
        if (self.folder / SINGLE).is_file():
            return self._single(_weight_map(index) if index.is_file() else {})
        if index.is_file():
            return self._sharded(index)
        raise ConfigError(_nothing_found(self.folder))

    def _refuse_other_layers(self) -> None:
        """Refuse what transformers would read instead of, or on top of, the weight files."""
        parts = sorted(path.name for path in self.folder.glob("shard-*") if DISTRIBUTED.fullmatch(path.name))
        if parts:
            raise ConfigError(
                f"{self.folder} holds a distributed checkpoint ({parts[0]}, ...)\n"
                "  why: transformers reads these files before all others, and kdtrain cannot\n"
                "  fix: convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
            )
        if (self.folder / ADAPTER).is_file():
            raise ConfigError(
                f"{self.folder} holds an adapter ({ADAPTER})\n"
                "  why: with peft installed transformers adds it to the weights; kdtrain would leave it out\n"
                "  fix: merge it (merge_and_unload(), save_pretrained), or remove the adapter's files"
            )

    def _named(self, named: str) -> list[Place]:
        # compare names without resolving links: a download cache links every file to a store outside the folder
        inside = Path(os.path.abspath(self.folder / named)).is_relative_to(os.path.abspath(self.folder))
        if not named.endswith((".safetensors", ".safetensors.index.json")) or not inside:
            raise ConfigError(
                f"{self.folder}: config.json sets transformers_weights = {named!r}\n"
                "  why: it names the file with the weights: *.safetensors or *.safetensors.index.json in this folder\n"
                "  fix: correct it, or remove it from config.json"
            )
        if not (self.folder / named).is_file():
            raise ConfigError(
                f"{self.folder} lacks {[named]}, named by transformers_weights in config.json\n"
                "  fix: fetch the missing file"
            )
        if named.endswith(".json"):
            return self._sharded(self.folder / named)
        return self._tensors([named])

    def _single(self, weight_map: dict[str, str]) -> list[Place]:
        """The tensors of SINGLE.

        Refuses if shards beside it (`weight_map`'s or unindexed ones) hold different tensors.
        """
        places = self._tensors([SINGLE])
        beside = {file for file in weight_map.values() if (self.folder / file).is_file()}
        shards = {path.name for path in self.folder.glob("model-*") if SHARD.fullmatch(path.name)}
        mine = dict((key, (file, key)) for file, key in places)
        for file in sorted((beside | shards) - {SINGLE}):
            for _, key in self._tensors([file]):
                if key not in mine or not self.equal(mine[key], (file, key)):
                    raise ConfigError(
                        f"{self.folder} holds two sets of weights: {SINGLE} and {file} differ in {key!r}\n"
                        f"  why: transformers reads {SINGLE} even when it is older, other tools the shards\n"
                        f"  fix: remove {SINGLE}, or the shards and any {INDEX}, whichever is not meant"
                    )
        return places

    def _sharded(self, index: Path) -> list[Place]:
        """Every tensor of the files that `index` names."""
        weight_map = _weight_map(index)
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if not (self.folder / file).is_file()]
        if missing:
            raise ConfigError(f"{self.folder} lacks {missing}, named by {index.name}\n  fix: fetch the missing files")
        places = self._tensors(files)
        found = set(places)
        for key, file in weight_map.items():
            if (file, key) not in found:
                raise ConfigError(
                    f"{self.folder}: {index.name} places {key!r} in {file}, which does not hold it\n"
                    "  why: the index and the files belong to different models, or a file was replaced\n"
                    "  fix: fetch the folder again"
                )
        beside = {path.name for path in self.folder.glob("*.safetensors")} - set(files)
        if beside:
            LOGGER.info("%s: %s does not name %s: not read", self.folder, index.name, sorted(beside))
        return self._without_twins(places)

    def _without_twins(self, places: Iterable[Place]) -> list[Place]:
        seen: dict[str, Place] = {}
        for place in places:
            other = seen.setdefault(place[1], place)
            if other != place and not self.equal(other, place):
                raise ConfigError(
                    f"{self.folder}: {other[0]} and {place[0]} hold two different tensors {place[1]!r}\n"
                    "  why: files of different models have been mixed\n  fix: fetch the folder again"
                )
        return list(seen.values())

    def _tensors(self, files: Iterable[str]) -> list[Place]:
        return [(file, key) for file in files for key in sorted(self._reader(file).keys())]

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


def _comparable(tensor: Tensor) -> Tensor:
    """View 8-bit floats, which torch cannot compare, as integers."""
    return tensor.view(torch.uint8) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file, from `index`. Raises ConfigError when it does not name files."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) for file in found.values()):
            raise ValueError("weight_map does not name files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index} is damaged: {error}\n  fix: fetch the file again") from error
    return dict(found)


def _nothing_found(folder: Path) -> str:
    others = sorted(path.name for kind in ("*.bin", "*.safetensors", "*.gguf") for path in folder.glob(kind))
    found = f"only {others[:5]}" if others else "none"
    return (
        f"{folder} has no {SINGLE} and no {INDEX} ({found})\n"
        "  why: kdtrain reads slices of safetensors, and pickled files can run code when opened\n"
        "  fix: convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER); if the index "
        "of a sharded folder is missing, fetch it again"
    )
