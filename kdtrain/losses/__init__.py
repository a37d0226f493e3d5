"""Losses on hidden states: streamed, vocabulary-parallel, with hand-written gradients.

The package needs torch only (no deepspeed, no transformers) and takes its process group as an argument, so it can be
used in another trainer.
"""

from kdtrain_kernels.divergences import DivergenceSpec, divergence_spec

from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.losses import matrix, reference
from kdtrain.losses.cross_entropy import linear_cross_entropy
from kdtrain.losses.dense_kl import linear_kd_loss
from kdtrain.losses.sparse_kl import linear_sparse_kd_loss
from kdtrain.losses.sparse_targets import merge_duplicates
from kdtrain.losses.types import LossParts, SparseTarget, TopK

__all__ = [
    "DivergenceSpec",
    "HeadShard",
    "LossParts",
    "SparseTarget",
    "TopK",
    "VocabShard",
    "divergence_spec",
    "linear_cross_entropy",
    "linear_kd_loss",
    "linear_sparse_kd_loss",
    "matrix",
    "merge_duplicates",
    "reference",
]
