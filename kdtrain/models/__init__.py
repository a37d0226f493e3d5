"""Networks: stock Hugging Face models behind `Backbone`. The only package that imports transformers."""

import logging
from typing import Any

# transformers imports torchao where it is installed. torchao then logs on every rank each GPU library that it could not
# load, and torch warns about two classes that torchao 0.18 registers.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["Backbone", "ModelSpec", "load_backbone", "model_rows"]


def __getattr__(name: str) -> Any:
    """Import the public names on first use: reading an architecture's name must not take seconds of imports."""
    if name == "Backbone":
        from kdtrain.models.backbone import Backbone

        return Backbone
    if name in __all__:
        from kdtrain.models import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
