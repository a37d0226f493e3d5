"""Check that a folder holds a model's weights, from the headers of its files, before a weight is read.

`--check` and loading both call `check_stored`, so a folder that passes the check can be loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch import Tensor

from kdtrain.errors import ConfigError
from kdtrain.models.safetensors_reader import SafetensorsFolder
from kdtrain.models.ties import kept_name, tied_names
from kdtrain.models.weight_files import Place

ORDINARY = ("F64", "F32", "F16", "BF16")
"""Dtypes, as safetensors spells them, whose numbers are the weights themselves."""

COUNTS = ("I64", "BOOL")
"""Dtypes of positions and masks, which quantised weights are not kept in."""

MARK_KEYS = ("quantization_config", "compression_config")
"""Keys of a config.json that mark its weights as quantised; transformers 5.23 uses only the first."""

MARK_FILES = {
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
}
"""Files beside a config.json that mark its weights as quantised -> the tool that writes them.

transformers 5.23 reads none.
"""

SCALES = re.compile(
    r"(^|[._:])(scales?|scale_inv|zeros|zero_points?|qzeros|qweight|qdata|g_idx|absmax|amax|quant_map|weight_packed"
    r"|weight_shape|SCB|codebooks?|codes|W_q|blocks)$|\.quant_state\."
)
"""Parts of the names of unused tensors that belong to quantised weights."""

HARMLESS = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|position_ids|masked_bias|causal_mask|embed_positions\._float_tensor)$"
)
"""Tensors that older releases of transformers saved and that models now compute from their config."""

MASK = re.compile(r"attn\.bias$|attention\.bias$")
"""A causal mask that older releases saved, if it has the shape [1, 1, n, n]."""

SWITCH = "set allow_unused_weights=true in the section of this model, student or teacher"


def check_stored(model: Any, folder: Path, *, allow_unused: bool = False) -> None:
    """Raise ConfigError unless the weight files of `folder` hold all of `model`, in ordinary numbers, and nothing else.

    model: whole, parameters possibly on meta. Compares the names, shapes and dtypes in the files' headers; reads
    tensors only where two of them must be equal (tied ones, two sets of weights in one folder). allow_unused: accept
    tensors that have no place in the model and marks of quantisation; parameters stored in another dtype than float16,
    bfloat16, float32 and float64 are always refused. Does not communicate.
    """
    with SafetensorsFolder(folder, model) as stored:
        needed = {kept_name(model, name): param for name, param in model.named_parameters()}
        needed |= dict(persistent_buffers(model))
        unused = list(_unused(model, stored, needed.keys()))
        _refuse_quantised(stored, needed, unused, allow_unused=allow_unused)
        _refuse_missing(model, stored, needed.keys(), unused)
        for name, tensor in needed.items():
            _check_shape(stored, name, tuple(tensor.shape))
        if unused and not allow_unused:
            raise _unused_error(folder, unused)
        _check_tied(model, stored)


def quantised_mark(settings: Mapping[str, Any]) -> str | None:
    """The key of a config.json's content that marks the weights as quantised; None if there is none."""
    return next((key for key in MARK_KEYS if settings.get(key)), None)


def persistent_buffers(model: Any) -> list[tuple[str, Tensor]]:
    """(name, buffer) of every persistent buffer, which files keep besides parameters."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [(name, tensor) for name, tensor in model.state_dict().items() if name not in parameters]


def _places(stored: SafetensorsFolder, name: str) -> list[Place]:
    """Locations of the tensors that form the parameter or buffer `name`; empty if the files lack it."""
    if name in stored.grouped:
        return [place for places in stored.grouped[name].places for place in places]
    return [stored.place[name]] if name in stored.place else []


def _check_shape(stored: SafetensorsFolder, name: str, shape: tuple[int, ...]) -> None:
    if name in stored.grouped:
        shape = (stored.grouped[name].rows_of(shape), shape[2])
    for place in _places(stored, name):
        stored.check_shape(place, shape)


def _unused(model: Any, stored: SafetensorsFolder, needed: Set[str]) -> Iterator[Place]:
    """Tensors without a place in the model, except those that older releases or its class mark as harmless."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    tied = tied_names(model)
    for name, place in stored.place.items():
        names = (name, f"{model.base_model_prefix}.{name}")
        if name in needed or name in tied or HARMLESS.search(name):
            continue
        if any(pattern.search(spelled) for pattern in ignored for spelled in names):
            continue
        shape = stored.files.shape(place)
        if not (MASK.search(name) and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]):
            yield place


def _refuse_quantised(
    stored: SafetensorsFolder, needed: Mapping[str, Tensor], unused: list[Place], *, allow_unused: bool
) -> None:
    folder, dtype = stored.folder, stored.files.dtype
    mark = next((f"{name}, of {writer}" for name, writer in MARK_FILES.items() if (folder / name).is_file()), None)
    floats = [name for name, tensor in needed.items() if tensor.is_floating_point()]
    odd = [place for name in floats for place in _places(stored, name) if dtype(place) not in ORDINARY]
    scales = [place for place in unused if SCALES.search(place[1]) or dtype(place) not in (*ORDINARY, *COUNTS)]
    if odd:
        what = f"tensor {odd[0][1]!r} of {odd[0][0]} is stored as {dtype(odd[0])}{_more(odd)}"
        fix = "use the unquantised model, or dequantise this one into a new folder"
    elif scales and not allow_unused:
        (file, key), more = scales[0], _more(scales)
        what = f"tensor {key!r} of {file} ({dtype(scales[0])}) has no place in the model{more}"
        fix = f"use the unquantised model; if the weights are ordinary anyway, {SWITCH}"
    elif mark is not None and not allow_unused:
        what, mark = f"it has {mark}", None
        fix = f"use the unquantised model; if the weights are ordinary anyway, remove that file, or {SWITCH}"
    else:
        return
    raise ConfigError(
        f"{folder} is quantised: {what}" + ("" if mark is None else f" (and there is {mark})") + "\n"
        "  why: read as they are, without their scales, such numbers are not the model's weights\n"
        f"  fix: {fix}"
    )


def _more(places: list[Place]) -> str:
    return "" if len(places) == 1 else f", and {len(places) - 1} more like it"


def _refuse_missing(model: Any, stored: SafetensorsFolder, needed: Set[str], unused: list[Place]) -> None:
    missing = [name for name in needed if not _places(stored, name)]
    if not missing:
        return
    base = f"{model.base_model_prefix}."
    if base != "." and set(missing) == {name for name in needed if not name.startswith(base)}:
        raise ConfigError(
            f"{stored.folder} has no tensor for the head {missing[0]!r}, which config.json does not tie to the "
            "embedding\n"
            "  why: a base model was saved (AutoModel), which has no head; transformers would make one up at random\n"
            "  fix: save the whole model (AutoModelForCausalLM), or set tie_word_embeddings=true in config.json if the "
            "model was trained with a tied head"
        )
    others = f"; without a place in it: {[key for _, key in unused[:3]]}" if unused else ""
    raise ConfigError(
        f"{stored.folder} has no tensor for parameter {missing[0]!r} of {type(model).__name__} "
        f"({len(missing)} are missing{others})\n"
        "  why: config.json and the weights belong to different models, or the download is incomplete\n"
        "  fix: fetch the folder again"
    )


def _unused_error(folder: Path, unused: list[Place]) -> ConfigError:
    file, key = unused[0]
    return ConfigError(
        f"{folder}: tensor {key!r} of {file} has no place in the model" + _more(unused) + "\n"
        "  why: what the model computes without them may not be what its makers trained: config.json may belong to "
        "another model (fewer layers, no biases), or an adapter was not merged\n"
        f"  fix: correct config.json; if the model does not need them (extra heads, a vision tower), {SWITCH}"
    )


def _check_tied(model: Any, stored: SafetensorsFolder) -> None:
    """Refuse a folder that ties two weights but holds different ones.

    Every rank compares whole tensors, so all ranks decide alike.
    """
    place = stored.place
    for name, kept in sorted(tied_names(model).items()):
        if name in place and kept in place and not stored.files.equal(place[name], place[kept]):
            raise ConfigError(
                f"{stored.folder}: config.json ties {name!r} to {kept!r}, but the files hold two different tensors\n"
                "  why: transformers keeps both, so the model does not compute what its config.json declares\n"
                "  fix: set tie_word_embeddings=false in config.json to use both, or remove the tensor that is not "
                "meant"
            )
