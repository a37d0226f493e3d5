"""Section log: console, metrics, Weights & Biases."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(kw_only=True, slots=True)
class WandbSection:
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = "off"
    """offline needs neither account nor network; the console names the `wandb sync` that uploads all parts of the run
    later, as one curve over optimizer steps."""
    project: str = "kdtrain"
    """Project name."""
    entity: str | None = None
    """Team or user. null: the account's default."""


@dataclass(kw_only=True, slots=True)
class LogSection:
    """Reports."""

    every_steps: int = 10
    """Steps between console lines and metric records (means over the steps between)."""
    wandb: WandbSection = field(default_factory=WandbSection)
    """Weights & Biases sink."""
