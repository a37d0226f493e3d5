"""A frozen teacher on the same ranks as the student.

`plain`: every rank holds the whole teacher; the ranks of a tp group share out the sequences of a micro-batch and
gather the hidden states, so no forward pass is done twice. `tp`: the teacher is cut like the student and every rank
of a tp group runs all sequences together. Either way each rank gets the hidden states of all tokens and only its own
rows of the teacher's head: the full-vocabulary distribution exists nowhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdtrain.data.batch import Batch
from kdtrain.dist.collectives import gather_ranks
from kdtrain.dist.mesh import Mesh
from kdtrain.dist.vocab import HeadShard, VocabShard
from kdtrain.models.backbone import Backbone
from kdtrain.teacher.signal import DenseSignal


class OnlineTeacher:
    """Turns a micro-batch into a `DenseSignal`.

    backbone: the frozen model, whole (tp size 1) or cut over the student's tp group.
    mesh: the student's mesh. shard: the student's vocabulary shard; both heads must have the same rows.
    """

    def __init__(self, backbone: Backbone, mesh: Mesh, shard: VocabShard) -> None:
        self.backbone = backbone.eval()
        self._mesh = mesh
        self._shares_sequences = mesh.tp_size > 1 and backbone.shard != shard
        full = backbone.lm_head_shard
        if backbone.shard == shard:
            self._head = full
        else:
            rows = slice(shard.start, shard.stop)
            bias = None if full.bias is None else full.bias[rows]
            self._head = HeadShard(full.weight[rows], bias, full.logit_scale, full.softcap)
        if self._head.weight.shape[0] != shard.rows:
            raise ValueError(
                f"the teacher's head has {full.weight.shape[0]} rows, which do not cover rows "
                f"[{shard.start}, {shard.stop}) of the student's shard; load both with the same total_rows"
            )

    @torch.no_grad()
    def signal(self, batch: Batch) -> DenseSignal:
        """The teacher's view of `batch`.

        Communicates over tp: nothing extra when the teacher is cut like the student; one all-gather of [T/tp, E]
        when the ranks share out the sequences.
        """
        hidden = self._shared_forward(batch) if self._shares_sequences else self.backbone.hidden_states(batch)
        return DenseSignal(hidden, self._head)

    def _shared_forward(self, batch: Batch) -> Tensor:
        num_sequences, seq_len = batch.input_ids.shape
        share = -(-num_sequences // self._mesh.tp_size)
        # The last ranks repeat the final sequence when the shares do not come out even: equal shapes for the gather.
        first = self._mesh.tp_rank * share
        rows = torch.arange(first, first + share, device=batch.input_ids.device).clamp_(max=num_sequences - 1)
        mine = Batch(*(getattr(batch, name)[rows] for name in Batch.__slots__))
        hidden = self.backbone.hidden_states(mine)
        gathered = gather_ranks(hidden, self._mesh.tp_group)
        return gathered.reshape(-1, hidden.shape[-1])[: num_sequences * seq_len]
