"""Section student: the trained model."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.config.schema.types import Attention, Dtype


@dataclass(kw_only=True, slots=True)
class StudentSection:
    """The trained model: Hugging Face weights, or a named architecture initialised from run.seed."""

    weights: str | None = None
    """Hugging Face model folder to start from. null: initialise `architecture`."""
    architecture: str | None = None
    """A name from `kdtrain.models.architectures`, or a folder or file with a Hugging Face config.json. The
    vocabulary size always comes from the tokenizer of the training store."""
    dtype: Dtype = "bfloat16"
    """Dtype of weights and activations, but for tensors that transformers keeps in float32 (refused at zero.stage 3).
    Master weights and optimizer states are always float32."""
    attention: Attention = "auto"
    """Attention implementation; auto takes the first that works and keeps documents apart: flash_attention_2 on CUDA,
    packed, sdpa, eager; with data.reset_positions=false sdpa before packed (docs/models.md)."""
    activation_checkpointing: bool = False
    """Recompute each layer in backward: less memory, about a third more time."""
    allow_unused_weights: bool = False
    """Start although the files of `weights` hold tensors that have no place in the model, or are marked as quantised
    while their numbers are ordinary (docs/models.md). Parameters that are stored quantised are refused all the same."""
