"""A teacher one micro-batch ahead on a second stream: equality of results, time of a step, memory.

    python benchmarks/gpu_overlap.py [--out FOLDER] [--cpu]

Stacks of torch's own transformer layers stand in for both models, so that nothing but torch is needed. A step is four
micro-batches through OnlineTeacher, linear_kd_loss and backward, with teacher.overlap on and off in turn. `same`:
losses of ten steps and the head's gradient are bitwise equal; a missing wait between streams shows as a difference.
Memory freed by the main stream is overwritten between steps; that tensors outlive their use on the other stream is
what `streams` of gpu_probe.py checks. Exits with 1 if they differ. On the CPU nothing overlaps, and only the control
flow is tested, with two steps of models of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import measuring as common
import torch
from gpu_common import Setting, whole_shard
from torch import Tensor, nn

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import linear_kd_loss
from kdtrain.teacher.online import OnlineTeacher, Passes
from kdtrain.teacher.side_stream import SideStream

STEPS, CPU_STEPS, MICRO_BATCHES = 10, 2, 4


class Stack(nn.Module):
    """The part of Backbone's interface that OnlineTeacher uses, without a model's weights or transformers."""

    def __init__(self, setting: Setting, vocab: int, width: int, layers: int, *, trainable: bool) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.shard, self.cp_group = whole_shard(vocab), None
        self.embedding = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, 0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Parameter(torch.randn(vocab, width) * 1.5 / width**0.5)
        self.to(setting.device, setting.dtype).requires_grad_(trainable)

    @property
    def lm_head_shard(self) -> HeadShard:
        return HeadShard(self.head, None)

    def hf_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.named_parameters()

    def hidden_states(self, batch: Batch) -> Tensor:
        x = self.embedding(batch.input_ids)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return x.flatten(0, 1)


def micro_batches(setting: Setting, vocab: int, sequences: int, seq_len: int) -> list[Batch]:
    rng = torch.Generator(setting.device).manual_seed(1)
    found = []
    for _ in range(MICRO_BATCHES):
        ids, labels = (
            torch.randint(vocab, (sequences, seq_len), generator=rng, device=setting.device) for _ in range(2)
        )
        ones = torch.ones(sequences, seq_len, device=setting.device)
        positions = torch.arange(seq_len, device=setting.device).repeat(sequences, 1)
        found.append(Batch(ids, labels, ones, positions, torch.arange(sequences, device=setting.device)))
    return found


def step(student: Stack, teacher: OnlineTeacher, batches: list[Batch]) -> list[Tensor]:
    """The losses; gradients are added to the student's."""
    losses = []
    teacher.prefetch(batches)
    for batch in batches:
        signal, ones = teacher.signal(batch), batch.loss_mask.flatten()
        loss = linear_kd_loss(
            student.hidden_states(batch),
            student.head,
            signal.hidden_states,
            signal.head.weight,
            batch.labels.flatten(),
            divergence="forward_kl",
            kd_weight=ones,
            ce_weight=ones,
            shard=student.shard,
        ).loss
        loss.backward()
        losses.append(loss.detach())
    return losses


def overwrite(setting: Setting, numel: int) -> None:
    """Allocate the memory that was freed last and fill it with nan, so that a tensor released too early becomes nan."""
    blocks = [torch.full((numel,), float("nan"), device=setting.device, dtype=setting.dtype) for _ in range(8)]
    blocks.clear()


def answers(setting: Setting, student: Stack, teacher: OnlineTeacher, batches: list[Batch]) -> list[Tensor]:
    """Losses of some steps and the head's gradient, which every kernel here accumulates in a fixed order."""
    student.zero_grad(set_to_none=True)
    losses = []
    for _ in range(CPU_STEPS if setting.is_cpu else STEPS):
        losses += step(student, teacher, batches)
        overwrite(setting, batches[0].num_tokens * teacher.backbone.head.shape[1])
    assert student.head.grad is not None
    return [*losses, student.head.grad]


def cases(setting: Setting) -> list[tuple[int, tuple, tuple, int, int]]:
    """(vocabulary, student's and teacher's width and layers, sequences, tokens of each), from busy to idle devices."""
    found = [
        (32000, (1024, 8), (2048, 8), 4, 1024),
        (128256, (2048, 8), (4096, 8), 8, 1024),
        (32000, (512, 4), (1024, 8), 1, 512),
    ]
    if not setting.is_cpu:
        return found
    return [
        (vocab, *((setting.width(width), 1) for width, _ in models), setting.rows(sequences), setting.rows(length))
        for vocab, *models, sequences, length in found
    ]


def compared(
    setting: Setting, vocab: int, student: tuple, teacher: tuple, sequences: int, seq_len: int
) -> Iterator[dict]:
    """Rows without and with overlap."""
    learner, backbone = (
        Stack(setting, vocab, *student, trainable=True),
        Stack(setting, vocab, *teacher, trainable=False),
    )
    batches = micro_batches(setting, vocab, sequences, seq_len)
    shape = f"V={vocab} D={student[0]}x{student[1]} E={teacher[0]}x{teacher[1]} T={MICRO_BATCHES}x{sequences}x{seq_len}"
    sides = {"off": None, "on": SideStream(setting.device)}
    teachers = {
        name: OnlineTeacher(backbone, Mesh(), learner.shard, Mesh(), passes=Passes(side=side))
        for name, side in sides.items()
    }
    want = answers(setting, learner, teachers["off"], batches)
    for name, source in teachers.items():
        got = answers(setting, learner, source, batches)
        same = all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
        run = partial(step, learner, source, batches)
        row = {"shape": shape, "overlap": name, "same": same, "peak_bytes": setting.peak_bytes(run)}
        times = common.percentiles(setting.seconds(run, runs=10))
        print(shape, "overlap", name, "same" if same else "DIFFERENT", times["median_ms"], "ms", flush=True)
        yield {**row, **times}


def main() -> None:
    setting = Setting.parse(__doc__)
    found = setting.write("overlap", (row for case in cases(setting) for row in compared(setting, *case)))
    if not all(row["same"] for row in found):
        raise SystemExit("a teacher on a second stream gave different results")


if __name__ == "__main__":
    main()
