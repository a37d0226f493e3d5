"""Which checkpoints a run writes, keeps and continues from; the format is `kdtrain.engine.checkpoint`'s."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch

from kdtrain.data.loader import StepLoader
from kdtrain.engine import checkpoint
from kdtrain.engine.zero import StudentEngine
from kdtrain.errors import ConfigError
from kdtrain.log import LOGGER
from kdtrain.training.progress import Progress
