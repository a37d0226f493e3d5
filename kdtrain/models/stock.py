"""Stock classes of transformers, and a folder's settings without those that refer to other code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from kdtrain.errors import ConfigError

FOREIGN = ("auto_map", "custom_pipelines", "_name_or_path", "name_or_path", "_commit_hash", "quantization_config")
"""Keys that name custom code, a former path of the model, or another form of its weights."""

FLOAT_TAG = "__float__"
"""The only key of an object that encodes a number missing in JSON, as transformers 5 writes it."""

BUILD_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ArithmeticError,
    ImportError,
    StrictDataclassError,
)
"""Errors that stock code raises for a config with inconsistent settings."""


def stock_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without FOREIGN keys: kdtrain runs and writes only classes of transformers with plain weights.

    Infinite numbers, which config.json and checkpoints keep as {"__float__": "Infinity"} (Mamba-2's time_step_limit),
    become numbers again.
    """
    return {key: _numbers(value) for key, value in settings.items() if key not in FOREIGN}


def stock_model(config: Any, source: str, **arguments: Any) -> Any:
    """`AutoModelForCausalLM.from_config`. Raises ConfigError, naming `source`, when the class cannot be built."""
    try:
        return AutoModelForCausalLM.from_config(config, **arguments)  # type: ignore[no-untyped-call]
    except BUILD_ERRORS as error:
        raise refused(source, error) from error


class _ExpertsOnMeta(TorchFunctionMode):
    """Create packed experts on the meta device: those of one layer can be 30 GB."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and len(args[0] if args and isinstance(args[0], tuple) else args) == 3:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside have parameters on the meta device and real buffers (RoPE frequencies, scales)."""

    def to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
        if param is None or param.is_meta:
            return None
        return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        with _ExpertsOnMeta():
            yield
    finally:
        handle.remove()


def refused(source: str, error: Exception) -> ConfigError:
    """The ConfigError for settings that transformers rejects. source: the model's name in the message."""
    return ConfigError(
        f"{source}: transformers refuses its config.json: {str(error) or type(error).__name__}\n"
        "  why: its settings do not fit each other (such as pad_token_id past the last of vocab_size rows), or one "
        "has a value unknown to transformers\n"
        "  fix: restore config.json from its source, or correct the setting"
    )


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {FLOAT_TAG} and value[FLOAT_TAG] in ("Infinity", "-Infinity", "NaN"):
            return float(value[FLOAT_TAG])
        return {key: _numbers(part) for key, part in value.items()}
    return [_numbers(part) for part in value] if isinstance(value, list) else value
