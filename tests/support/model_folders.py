"""Compare `--check` and a run on the same model folder, and edit a folder for that test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import KdtrainError
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import ModelSpec, check_architecture, load_backbone

T = TypeVar("T")


def check_and_load(
    folder: Path,
    *,
    trainable: bool = False,
    packed: bool = True,
    mesh: Mesh | None = None,
    vocab_size: int = 99,
    sequence: bool = False,
    **spec: Any,
) -> Backbone:
    """The Backbone that `load_backbone` makes of `folder`, or its error, after `check_architecture` gave the same
    outcome."""
    model, mesh = ModelSpec(weights=str(folder), **{"dtype": "float32", **spec}), mesh or Mesh()
    how: dict[str, Any] = {"trainable": trainable, "packed": packed, "sequence": sequence}
    checked = outcome(lambda: check_architecture(model, vocab_size, mesh, **how))
    loaded = outcome(lambda: load_backbone(model, mesh, vocab_size=vocab_size, **how))
    if isinstance(loaded, KdtrainError):
        assert (type(checked), str(checked)) == (type(loaded), str(loaded))
        raise loaded
    assert isinstance(checked, Backbone), checked
    assert checked.full_shapes() == loaded.full_shapes()
    assert checked.attention == loaded.attention
    return loaded


def outcome(work: Callable[[], T]) -> T | KdtrainError:
    """What `work` returns, or the error for users that it raises."""
    try:
        return work()
    except KdtrainError as error:
        return error


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors of folder/model.safetensors, by name."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file's outermost object; those given as None are removed."""
    settings = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}), encoding="utf-8")
