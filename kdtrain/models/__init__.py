"""Networks: stock Hugging Face models behind `Backbone`. The only package that imports transformers."""

import logging
from typing import Any

# transformers imports torchao where it is installed. On every rank it then names each GPU library that it could not
# load, and torch warns of how torchao 0.18 registers two of its classes.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)

__all__ = ["Backbone", "ModelSpec", "load_backbone", "model_rows"]


def __getattr__(name: str) -> Any:
    """The public names, on first use: reading an architecture's name must not cost seconds of imports."""
    if name == "Backbone":
        from kdtrain.models.backbone import Backbone

        return Backbone
    if name in __all__:
        from kdtrain.models import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
