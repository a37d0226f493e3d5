"""Signals of the frozen teacher: dense from a running model, top-k and sampled targets, stored records."""

from kdtrain.teacher.sampling import sample_targets
from kdtrain.teacher.stored.logit_store import LogitStore
from kdtrain.teacher.topk import linear_topk

__all__ = ["LogitStore", "linear_topk", "sample_targets"]
