"""Which attention implementations keep packed documents apart, class by class: a column of `architectures.py`.

sdpa and eager run on a tiny copy whose first document changes. `packed` and stand-ins for the flash-attention packages
must compute what the copy computes with masks, get the documents' boundaries in every attention layer, and fit the
heads of the default config. A run makes the same measurement on its own models before it chooses an implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

NO_COPY = "no tiny copy"
NOT_MEASURED, NONE = "not measured", "none"
LEAK = "documents attend to each other with masks, the reference for the rest"


@dataclass(frozen=True, slots=True)
class Apart:
    """names: of the implementations, as the table has them. missing: why the others are not among them."""

    names: str
    missing: str


def documents_apart(model_type: str, copies: Sequence[Mapping[str, Any]]) -> Apart:
    """Result for the default config of `model_type`; copies: settings of tiny copies, the smallest first."""
    from kdtrain.models.attention import FLASH, PACKED

    found: dict[str, str | None] = {"sdpa": f"{NO_COPY}: its config has no width", "eager": f"{NO_COPY}: the same"}
    for settings in copies:
        found = {name: _tried(partial(_masked, settings, name)) for name in ("sdpa", "eager")}
        if not all(str(obstacle).startswith(NO_COPY) for obstacle in found.values()):
            break
    else:
        return Apart(NOT_MEASURED, f"packed documents: {found['sdpa']}")
    more = {
        name: _declared(model_type, name) or _tried(partial(_in_place_of_masks, settings, name, found))
        for name in (PACKED, *FLASH)
    }
    return apart_of({PACKED: more.pop(PACKED), **found, **more})


def _tried(work: Callable[[], str | None]) -> str | None:
    """The result of `work`, or the reason why there is no tiny copy to run it on."""
    from kdtrain.errors import KdtrainError
    from kdtrain.models.stock import BUILD_ERRORS

    try:
        return work()
    except (KdtrainError, *BUILD_ERRORS, OSError) as error:
        return f"{NO_COPY}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"[:200]


def apart_of(obstacles: Mapping[str, str | None]) -> Apart:
    """Flash-attention is one name if all packages agree; implementations with the same reason are named together."""
    reasons: dict[str, list[str]] = {}
    for name, obstacle in obstacles.items():
        if obstacle is not None:
            reasons.setdefault(obstacle, []).append(name)
    missing = "; ".join(f"no {_names(names)}: {reason}" for reason, names in reasons.items())
    return Apart(_names([name for name, obstacle in obstacles.items() if obstacle is None]) or NONE, missing)


def _names(names: list[str]) -> str:
    flash = [name.removeprefix("flash_attention_") for name in names if name.startswith("flash")]
    short = [name for name in names if not name.startswith("flash")]
    if flash:
        short.append("flash" if len(flash) == 3 else f"flash {' '.join(flash)}")
    return ", ".join(short)


def _on_meta(settings: Mapping[str, Any], attention: str | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    from kdtrain.models.composite import refuse_composite
    from kdtrain.models.stock import parameters_on_meta

    config = AutoConfig.for_model(**settings)
    refuse_composite(config.to_dict(), config.model_type)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    attention = attention or ("sdpa" if kind._supports_sdpa else "eager")
    with parameters_on_meta():
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def _declared(model_type: str, name: str) -> str | None:
    """The obstacle declared by the class and the heads of its default config, if a model can be built from that
    config."""
    from kdtrain.models.attention_probe import declared_obstacle

    found = _tried(lambda: declared_obstacle(_on_meta({"model_type": model_type}), name))
    return None if str(found).startswith(NO_COPY) else found


def _masked(settings: Mapping[str, Any], name: str) -> str | None:
    from kdtrain.models.attention_probe import attention_obstacle
    from kdtrain.models.probe import LARGEST_COPY, TOLERANCE, measure

    model = _on_meta(settings)
    if (size := sum(param.numel() for param in model.parameters())) > LARGEST_COPY:
        return f"{NO_COPY}: the smallest one has {size:,} parameters"
    if (found := attention_obstacle(model, settings["model_type"], name)) is not None:
        return found
    if model.config._attn_implementation != name:
        model = _on_meta(settings, name)
    findings = measure(model, settings["model_type"])
    if findings.leak > TOLERANCE:
        return LEAK
    return None if findings.joined > TOLERANCE else "a tiny copy does not look back"


def _in_place_of_masks(settings: Mapping[str, Any], name: str, masked: Mapping[str, str | None]) -> str | None:
    """The obstacle of an implementation that is compared with masked attention; inherits the obstacle of the masks."""
    from kdtrain.models.attention_probe import attention_obstacle

    model = _on_meta(settings)
    if masked[model.config._attn_implementation] is not None:
        return masked[model.config._attn_implementation]
    return attention_obstacle(model, settings["model_type"], name)
