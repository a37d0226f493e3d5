"""Signals of the frozen teacher: dense from a running model, top-k and sampled targets."""

from kdtrain.teacher.sampling import sample_targets
from kdtrain.teacher.topk import linear_topk

__all__ = ["linear_topk", "sample_targets"]
