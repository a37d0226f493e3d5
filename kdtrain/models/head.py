"""Load only the head of a Hugging Face folder, for a rank that does not run the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.errors import ConfigError
from kdtrain.models.dtypes import stock_dtypes
from kdtrain.models.info import ModelInfo, info_of
from kdtrain.models.load import DTYPES, ModelSpec, build_config
from kdtrain.models.safetensors_reader import SafetensorsFolder
from kdtrain.models.stock import parameters_on_meta, stock_model
from kdtrain.models.stored_weights import check_stored
from kdtrain.models.ties import kept_name
from kdtrain.parallel.plan import vocabulary_modules
from kdtrain.parallel.shard import head_scaling


@dataclass(frozen=True, slots=True)
class LoadedHead:
    """head: the requested rows. info: of the whole model. elements_read: from its files."""

    head: HeadShard
    info: ModelInfo
    elements_read: int


def load_head(spec: ModelSpec, shard: VocabShard, *, device: torch.device | str = "cpu") -> LoadedHead:
    """The rows `shard` of the head of spec.weights, as `load_backbone` loads them; rows past the model's own are zeros.

    Checks the headers of all files and reads only those rows. Does not communicate. Raises ConfigError or ParallelError
    as `load_backbone`.
    """
    if spec.weights is None:
        raise ConfigError("only a model with weights has a head to read\n  fix: set teacher.weights to a model folder")
    with parameters_on_meta():
        config = build_config(spec, shard.vocab_size, trainable=False)
        model = stock_model(config, f"model {spec.weights!r}", dtype=torch.float32)
    check_stored(model, Path(spec.weights), allow_unused=spec.allow_unused_weights)
    dtypes = stock_dtypes(model, DTYPES[spec.dtype])
    model.config.dtype = DTYPES[spec.dtype]
    name = vocabulary_modules(model)[1]
    module, (scale, softcap) = model.get_submodule(name), head_scaling(model.config)
    with SafetensorsFolder(Path(spec.weights), model) as files:

        def rows(parameter: str) -> torch.Tensor:
            shape = tuple(model.get_parameter(parameter).shape)
            start, stop = min(shard.start, shape[0]), min(shard.stop, shape[0])
            value = torch.zeros((shard.rows, *shape[1:]), dtype=dtypes[parameter], device=device)
            value[: stop - start] = files.read(kept_name(model, parameter), shape, 0, start, stop)
            return value

        bias = None if getattr(module, "bias", None) is None else rows(f"{name}.bias")
        head = HeadShard(rows(f"{name}.weight"), bias, scale, softcap)
        shapes = {name: tuple(param.shape) for name, param in model.named_parameters()}
        return LoadedHead(head, info_of(model, shapes, dtypes), files.elements_read)
