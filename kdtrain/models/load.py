"""Build a `Backbone` for this rank: from a Hugging Face folder, reading only this rank's slices, or from a seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import VocabShard
from kdtrain.errors import ConfigError, ParallelError
from kdtrain.models.architectures import read_architecture, read_config_json
from kdtrain.models.attention_choice import first_attention, run_size, use_attention
from kdtrain.models.backbone import Backbone
from kdtrain.models.composite import refuse_composite
from kdtrain.models.context import use_context
from kdtrain.models.context_probe import check_context
from kdtrain.models.dtypes import cast_buffers, dtypes_of, stock_dtypes
from kdtrain.models.experts import choose_products, refuse_mixture
from kdtrain.models.info import ModelInfo, info_of
from kdtrain.models.probe import check_model
from kdtrain.models.quantize import quantizable_layers
from kdtrain.models.rotary import say_document_lengths, use_document_lengths
from kdtrain.models.rotary_probe import check_neighbours
from kdtrain.models.safetensors_reader import SafetensorsFolder
from kdtrain.models.stock import BUILD_ERRORS, parameters_on_meta, refused, stock_model, stock_settings
from kdtrain.models.stored_weights import check_stored, persistent_buffers, quantised_mark
from kdtrain.models.ties import kept_name
from kdtrain.parallel.plan import plan_shards
from kdtrain.parallel.shard import materialize_parameter, shard_model
from kdtrain.parallel.shard_spec import ShardSpec
from kdtrain.parallel.shard_tensors import read_shard

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Which model, and how it runs. Exactly one of `weights` and `architecture` is set.

    weights: Hugging Face folder with config.json and safetensors. architecture: a name or a path to a config.json,
    initialised at random. dtype: "float32" or "bfloat16". attention: "auto" or an implementation's name.
    activation_checkpointing: recompute each layer in backward. allow_unused_weights: as student.allow_unused_weights.
    seq_len: tokens of the run's sequences; None if unknown: no attention is ruled out by size. sequences: per
    micro-batch of training. seed: of a random initialisation, which is the same full model for every layout.
    """

    weights: str | None = None
    architecture: str | None = None
    dtype: str = "bfloat16"
    attention: str = "auto"
    activation_checkpointing: bool = False
    allow_unused_weights: bool = False
    seq_len: int | None = None
    sequences: int = 1
    seed: int = 1


def model_rows(spec: ModelSpec, vocab_size: int) -> int:
    """Rows of the model's embedding and head; at least vocab_size, the tokenizer's true size.

    Two models that share a loss need one `total_rows`: the larger of theirs. Reads only config.json; does not
    communicate.
    Raises ConfigError when the model has fewer rows than `vocab_size`, or is multimodal.
    """
    config = _config_dict(spec, vocab_size)
    rows = config.get("vocab_size")
    if not isinstance(rows, int):
        raise ConfigError(
            f"{_source(spec)}: config.json has vocab_size = {rows!r}, not a whole number\n"
            "  why: it is the number of rows of the embedding and the head\n  fix: restore it from its source"
        )
    if rows < vocab_size:
        raise ConfigError(
            f"{_source(spec)} has vocab_size = {rows}, but the tokenizer has {vocab_size} tokens\n"
            "  why: ids past the model's last row have no embedding; this is another tokenizer's model\n"
            "  fix: use the model's own tokenizer to prepare the data, or another model"
        )
    return rows


def load_backbone(
    spec: ModelSpec,
    mesh: Mesh,
    *,
    vocab_size: int,
    total_rows: int | None = None,
    device: torch.device | str = "cpu",
    trainable: bool,
    packed: bool = True,
    sequence: bool = False,
) -> Backbone:
    """The model of `spec`, sharded for this rank of `mesh`, on `device`, tensors in spec.dtype except those that
    transformers keeps in another (`kdtrain.models.dtypes`: RoPE, routers of mixtures).

    vocab_size: tokens of the tokenizer. total_rows: rows to allocate over all ranks (default: the model's own).
    trainable False freezes it and sets eval mode. packed: whether position_ids will restart at documents, which then
    must not attend to each other. sequence: Megatron sequence parallelism over the tp ranks. Does not communicate;
    every rank must call it. Raises ConfigError or ParallelError with the reason and a fix, also for an architecture
    that fails the checks of `kdtrain.models.probe` on a tiny copy. All checks precede reading weights, and
    `check_architecture` makes the same ones.
    """
    rows = model_rows(spec, vocab_size)
    total = max(rows, total_rows or 0)
    shard = VocabShard.of(vocab_size, mesh.tp_rank, mesh.tp_size, total_rows=total)
    device = torch.device(device)
    model = _build(spec, vocab_size, device, trainable=trainable)
    dtypes = stock_dtypes(model, DTYPES[spec.dtype])
    backbone = _checked_and_cut(spec, model, mesh, shard, device, packed=packed, trainable=trainable, sequence=sequence)
    cast_buffers(model, dtypes)
    if spec.weights is not None:
        _read_weights(backbone, Path(spec.weights), mesh, device, dtypes)
    else:
        for name, param in list(backbone.hf_parameters()):
            materialize_parameter(model, name, param.detach().to(device, dtypes[name]), mesh)
    move_buffers(model, device)
    model.config.dtype = DTYPES[spec.dtype]
    backbone.info()  # after parameters have their dtypes and before ZeRO-3 removes their shapes
    return backbone.train(trainable)


def _config_dict(spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    settings = _read_config(spec, vocab_size)
    refuse_composite(settings, _source(spec))
    return settings


def _read_config(spec: ModelSpec, vocab_size: int) -> dict[str, Any]:
    if spec.dtype not in DTYPES:
        raise ConfigError(f"dtype = {spec.dtype!r} is not supported\n  fix: use one of {', '.join(DTYPES)}")
    if (spec.weights is None) == (spec.architecture is None):
        raise ConfigError(
            f"weights = {spec.weights!r} and architecture = {spec.architecture!r}: exactly one must be set\n"
            "  fix: weights for a pretrained model, architecture for a random one"
        )
    if spec.weights is None:
        assert spec.architecture is not None
        return read_architecture(spec.architecture, vocab_size)
    if not Path(spec.weights).is_dir():
        raise ConfigError(
            f"model folder {spec.weights!r} does not exist\n"
            "  fix: check the path; kdtrain never downloads a model, so give a folder with config.json and safetensors"
        )
    if not (Path(spec.weights) / "config.json").is_file():
        raise ConfigError(
            f"model folder {spec.weights!r} has no config.json, so it is not a Hugging Face model\n"
            "  fix: give the folder that holds config.json and *.safetensors"
        )
    return read_config_json(spec.weights)


def _source(spec: ModelSpec) -> str:
    return f"model {spec.weights!r}" if spec.weights is not None else f"architecture {spec.architecture!r}"


def build_config(spec: ModelSpec, vocab_size: int, *, trainable: bool = True) -> Any:
    """The Hugging Face config object of `spec`. Raises ConfigError if transformers rejects it or it is not a causal
    language model.

    trainable: False for a model that only runs forward, such as a teacher, which may be a mixture of experts.
    """
    settings = _config_dict(spec, vocab_size)
    if (mark := quantised_mark(settings)) is not None:
        raise ConfigError(
            f"{_source(spec)} is quantised: its config.json has {mark}\n"
            "  why: training and exact divergences need ordinary weights\n"
            "  fix: use the unquantised model; for GGUF files run launch/import_gguf.py first"
        )
    settings = stock_settings(settings)
    try:
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    except BUILD_ERRORS as error:
        raise refused(_source(spec), error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ConfigError(
            f"{_source(spec)} has model_type {config.model_type!r}, which is not a causal language model\n"
            "  fix: use a decoder-only language model"
        )
    refuse_mixture(config, _source(spec), trainable=trainable)
    return config


def model_info(spec: ModelSpec, vocab_size: int, *, trainable: bool = True) -> ModelInfo:
    """Config and size of `spec`, without reading or making a weight. Raises ConfigError as `build_config`."""
    config = build_config(spec, vocab_size, trainable=trainable)
    with parameters_on_meta():
        model = stock_model(config, _source(spec), dtype=DTYPES[spec.dtype])
    return info_of(model, {name: tuple(param.shape) for name, param in model.named_parameters()}, dtypes_of(model))


def check_architecture(
    spec: ModelSpec,
    vocab_size: int,
    mesh: Mesh,
    *,
    packed: bool = True,
    trainable: bool = True,
    sequence: bool = False,
    quantize: str | None = None,
) -> Backbone:
    """What `load_backbone` returns, with parameters on meta. Raises the same errors without reading or allocating
    weights.

    mesh: only its sizes are used, so it may describe a world that is not running. The device is not known: an attention
    that needs CUDA is assumed to be available. quantize: as teacher.quantize; raises the errors of `quantize_decoder_`.
    """
    shard = VocabShard.of(vocab_size, mesh.tp_rank, mesh.tp_size, total_rows=model_rows(spec, vocab_size))
    config = build_config(spec, vocab_size, trainable=trainable)
    with parameters_on_meta():
        model = stock_model(config, _source(spec), **_arguments(spec, config, None))
    backbone = _checked_and_cut(spec, model, mesh, shard, None, packed=packed, trainable=trainable, sequence=sequence)
    if quantize is not None:
        quantizable_layers(backbone.model, quantize)
    return backbone


def _checked_and_cut(
    spec: ModelSpec,
    model: Any,
    mesh: Mesh,
    shard: VocabShard,
    device: torch.device | None,
    *,
    packed: bool,
    trainable: bool,
    sequence: bool,
) -> Backbone:
    """Check `model` (unsharded) and the files of its folder, then shard it for this rank of `mesh`.

    device: None if not known yet.
    """
    source = _source(spec)
    check_model(model, source, packed=packed)
    if spec.weights is not None:
        check_stored(model, Path(spec.weights), allow_unused=spec.allow_unused_weights)
    implementation = use_attention(
        model,
        source,
        spec.attention,
        dtype=spec.dtype,
        device=device,
        packed=packed,
        cp_size=mesh.cp_size,
        size=run_size(model, mesh, device, packed=packed, seq_len=spec.seq_len, sequences=spec.sequences),
    )
    _prepare_context(model, mesh, source, packed)
    cuts = _cut(model, source, mesh, shard, trainable=trainable, sequence=sequence)
    if trainable and spec.activation_checkpointing:
        enable_activation_checkpointing(model)
    choose_products(model, DTYPES[spec.dtype])
    kept = {name: cut for name, cut in cuts.items() if kept_name(model, name) == name}
    return Backbone(model, shard, kept, mesh.cp_group, implementation=implementation)


def _cut(
    model: Any, source: str, mesh: Mesh, shard: VocabShard, *, trainable: bool, sequence: bool
) -> dict[str, ShardSpec]:
    """Cut `model`, whole until now, for this rank of `mesh`, in place; every cut by parameter name."""
    if trainable and mesh.tp_size > 1:
        _refuse_dropout(model)
    model.requires_grad_(trainable)
    try:
        cuts = plan_shards(model, mesh.tp_size, shard.rows)
        shard_model(model, mesh, shard, sequence=sequence)
    except ParallelError as error:
        note = "" if trainable else "\n  note: a teacher is cut over teacher.tp ranks, parallel.tp of them by default"
        raise ParallelError(f"{source}: {error}{note}") from error
    return cuts


def _prepare_context(model: Any, mesh: Mesh, source: str, packed: bool) -> None:
    """Check the model, then set rotary embeddings per document length and, if cp > 1, attention over the mesh's cp
    group."""
    if packed or mesh.cp_size > 1:
        check_neighbours(model, source, packed=packed)
    if mesh.cp_size > 1:
        check_context(model, source, packed=packed)
        use_context(model, mesh, source)
    say_document_lengths(use_document_lengths(model, source, mesh.cp_group), source)


def _build(spec: ModelSpec, vocab_size: int, device: torch.device, *, trainable: bool) -> Any:
    """The whole model: parameters on meta if weights are to be read, else initialised from spec.seed in float32."""
    config = build_config(spec, vocab_size, trainable=trainable)
    arguments = _arguments(spec, config, device)
    if spec.weights is not None:
        with parameters_on_meta():
            return stock_model(config, _source(spec), **arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return stock_model(config, _source(spec), **arguments)


def _arguments(spec: ModelSpec, config: Any, device: torch.device | None) -> dict[str, Any]:
    """Arguments of `from_config`: dtype, and attention with masks, which `use_attention` replaces.

    device: None if unknown.
    """
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    attention = first_attention(spec.attention, kind, dtype=spec.dtype, device=device)
    return {"dtype": torch.float32, "attn_implementation": attention}


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute each decoder layer in backward. Raises ConfigError if the architecture cannot."""
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute activations\n  fix: set student.activation_checkpointing=false"
        )
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _refuse_dropout(model: Any) -> None:
    settings = vars(model.config)
    dropouts = {key: value for key, value in settings.items() if key.endswith(("dropout", "pdrop")) and value}
    for of_another_task in ("classifier_dropout", "summary_first_dropout"):
        dropouts.pop(of_another_task, None)
    if dropouts:
        raise ParallelError(
            f"config.json sets {dropouts} and parallel.tp > 1\n"
            "  why: ranks would draw different masks for activations that must be equal\n"
            "  fix: set dropout to 0 (usual in pre-training), or parallel.tp=1"
        )


def _read_weights(
    backbone: Backbone, folder: Path, mesh: Mesh, device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> None:
    """Fill every parameter from this rank's slice of the files, which `check_stored` has checked.

    dtypes: target dtype by name.
    """
    model = backbone.model
    with SafetensorsFolder(folder, model) as files:
        for name, shape in backbone.full_shapes().items():
            cut = backbone.cuts.get(name)
            if cut is None:
                value = files.read(name, shape)
            else:
                value = read_shard(partial(files.read, name, shape, cut.dim), cut, mesh.tp_rank)
            materialize_parameter(model, name, value.to(device, dtypes[name]), mesh)
        for name, buffer in persistent_buffers(model):
            buffer.copy_(files.read(name, tuple(buffer.shape)))
        backbone.elements_read = files.elements_read
    left = [name for name, param in model.named_parameters() if param.is_meta]
    if left:
        raise ConfigError(f"{folder}: no weights were read for {left}\n  fix: this is a defect of kdtrain; report it")


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move buffers to `device` without changing their dtype; parameters stay where they are."""
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
