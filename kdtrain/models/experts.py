"""Load mixtures of experts: which kinds are supported, and which tensors of a folder form one parameter.

transformers packs the experts of a layer into one 3-D parameter, while published folders keep one tensor per expert
and projection. transformers keeps that mapping as data (`transformers.conversion_mapping`). Here it becomes a list of
tensors per parameter, so that any slice of a packed parameter can be read from slices of the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.models.shrink import COUNTS
from kdtrain.models.weight_files import Place
from kdtrain.parallel.experts import expert_modules

TEACHERS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "deepseek_v3",
    "gpt_oss",
    "cohere2_moe",
    "deepseek_v2",
    "dots1",
    "exaone_moe",
    "flex_olmo",
    "glm4_moe_lite",
    "granitemoe",
    "granitemoeshared",
    "hy_v3",
    "mimo_v2_flash",
    "phimoe",
    "solar_open",
)
"""Kinds whose hidden states, read from either form of folder, tests compare with those of `from_pretrained`."""


@dataclass(frozen=True, slots=True)
class PerExpert:
    """A packed parameter [experts, segments * rows, columns] in a folder that keeps a matrix per expert and segment.

    places[segment][expert]: where each [rows, columns] is.
    """

    places: tuple[tuple[Place, ...], ...]

    def rows_of(self, shape: tuple[int, ...]) -> int:
        """Of one expert's matrix. Raises ConfigError when the folder has another number of experts than `shape`."""
        for places in self.places:
            if len(places) != shape[0]:
                raise ConfigError(
                    f"{places[0][0]}: {len(places)} experts like {places[0][1]!r}, the model needs {shape[0]}\n"
                    "  why: config.json and the weights belong to different models, or the download is incomplete\n"
                    "  fix: fetch the folder again"
                )
        return shape[1] // len(self.places)

    def read(
        self,
        get: Callable[[Place, tuple[int, ...], tuple[slice, ...]], Tensor],
        shape: tuple[int, ...],
        dim: int,
        start: int,
        stop: int,
    ) -> Tensor:
        """Elements [start, stop) along `dim` of the packed parameter, whose full shape is `shape`.

        get(place, full shape, index): a slice of one expert's matrix; no other element is read. Raises as `rows_of`.
        """
        num_experts, rows, columns = shape
        size = self.rows_of(shape)
        bounds = [[0, num_experts], [0, rows], [0, columns]]
        bounds[dim] = [start, stop]
        (first, last), (top, bottom), (left, right) = bounds
        value: Tensor | None = None
        for segment, places in enumerate(self.places):
            # the rows of this segment that lie in [start, stop)
            begin, end = max(top, size * segment), min(bottom, size * (segment + 1))
            for expert in range(first, last) if begin < end else ():
                index = (slice(begin - size * segment, end - size * segment), slice(left, right))
                part = get(places[expert], (size, columns), index)
                if value is None:  # filled piece by piece, otherwise two whole copies would be in memory
                    value = part.new_empty((last - first, bottom - top, right - left))
                value[expert - first, begin - top : end - top] = part
        return torch.empty((last - first, bottom - top, right - left)) if value is None else value


def num_experts_of(config: Any) -> dict[str, int]:
    """Keys of `config`, nested sections included, that name more than one expert; empty for a dense model."""
    settings = config.to_dict()
    if settings.get("is_moe") is False or settings.get("enable_moe_block") is False:
        return {}
    places = (settings, *(value for value in settings.values() if isinstance(value, dict)))
    found = {key: place[key] for place in places for key in COUNTS if isinstance(place.get(key), int)}
    return {key: count for key, count in found.items() if count > 1}


def refuse_mixture(config: Any, source: str, *, trainable: bool) -> None:
    """Raise ConfigError if `config` is a mixture of experts that is not supported in this role.

    source: its name in messages.
    """
    found = num_experts_of(config)
    if not found or (not trainable and config.model_type in TEACHERS):
        return
    kind = f"{source} has model_type {config.model_type!r} with {found}: a mixture of experts"
    if trainable:
        raise ConfigError(
            f"{kind}\n"
            "  why: as a student it would need router losses, which this version adds to no objective, and gradients "
            "and checkpoints of packed experts, which it does not have\n"
            "  fix: train a dense model; a mixture can be its teacher"
        )
    raise ConfigError(
        f"{kind}\n"
        f"  why: of mixtures only {', '.join(TEACHERS)} have been compared with transformers, number by number\n"
        "  fix: use one of these as teacher, or a dense model"
    )


def group_experts(
    named: Iterable[tuple[str, str | None, Place]], converters: list[WeightConverter]
) -> tuple[dict[str, Place], dict[str, PerExpert]]:
    """(tensors that are parameters, parameters that are made of experts' tensors), by the model's parameter names.

    named: (the model's name, pattern of the converter that makes it, None for a tensor as it is, place) of every tensor
    in the folder. converters: transformers' rules for the model. Raises ConfigError when a rule does anything but stack
    experts and join their gate and up matrices.
    """
    of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    direct: dict[str, Place] = {}
    lists: dict[str, dict[str, list[tuple[list[object], Place]]]] = {}
    for name, pattern, place in named:
        if pattern is None:
            direct[name] = place
            continue
        _check_rule(of_pattern[pattern], name)
        lists.setdefault(name, {}).setdefault(pattern, []).append((_natural(place[1]), place))
    grouped = {}
    for target, by_pattern in lists.items():
        rule = of_pattern[next(iter(by_pattern))]
        patterns = [pattern for pattern in rule.source_patterns if pattern in by_pattern]
        grouped[target] = PerExpert(
            tuple(tuple(place for _, place in sorted(by_pattern[pattern])) for pattern in patterns)
        )
    return direct, grouped


def choose_products(model: Any, dtype: torch.dtype) -> None:
    """Compute experts in a loop when the rows of a packed parameter do not begin at multiples of 16 bytes.

    torch's grouped product, which transformers prefers, rejects those. The choice depends on local sizes and may differ
    between ranks, which is safe because experts do not communicate. Does nothing for a dense model.
    """
    packed = (param for _, module in expert_modules(model) for param in module.parameters(recurse=False))
    sizes = {size for param in packed if param.dim() == 3 for size in param.shape[1:]}
    odd = sorted(size for size in sizes if size * dtype.itemsize % 16)
    if odd:
        LOGGER.info("experts: rows of %s elements are not multiples of 16 bytes: one product per expert", odd)
        model.set_experts_implementation("eager")


def idle_parameters(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Parameters of the experts that a token is not routed to, in a model whose full parameters have `shapes`; 0 if
    dense."""
    idle = 0.0
    for name, module in expert_modules(model):
        for key, _ in module.named_parameters(recurse=False):
            shape = shapes[f"{name}.{key}"]
            used = min(model.config.num_experts_per_tok, shape[0]) / shape[0]
            idle += (1.0 - used) * torch.Size(shape).numel()
    return int(idle)


def _check_rule(rule: WeightConverter, target: str) -> None:
    operations = [(type(operation), getattr(operation, "dim", None)) for operation in rule.operations]
    if operations not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
        names = [f"{kind.__name__}(dim={dim})" for kind, dim in operations]
        raise ConfigError(
            f"parameter {target!r} would be made from {rule.source_patterns} by {names}\n"
            "  why: kdtrain only stacks the matrices of experts and joins gate and up\n"
            "  fix: convert once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER, "
            "save_original_format=False)"
        )


def _natural(key: str) -> list[object]:
    """Sort key that orders experts by number (10 after 9), for names that differ only in numbers."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]
