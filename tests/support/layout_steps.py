"""Three optimizer steps under DeepSpeed in any layout, which `layout_oracle` compares with plain torch.

Eight packed sequences with 11, 0, 1, ... valid tokens, changing rates, active clipping, weight decay, norms and biases
that are not ones and zeros. The data is the same for every layout; only its placement on ranks differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kdtrain.batch import Batch
from kdtrain.config.schema import DistillObjective, Dtype, PretrainObjective, RunConfig
from kdtrain.data.context import cut_sequences
from kdtrain.distributed.collectives import reduce_sum_
from kdtrain.distributed.mesh import Mesh
from kdtrain.documents import Documents
from kdtrain.engine import checkpoint
from kdtrain.jobs.build import teacher as build
from kdtrain.jobs.build.models import engine_settings, head_rows
from kdtrain.models.backbone import Backbone
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.objectives.distill import Distill
from kdtrain.objectives.pretrain import Pretrain
from kdtrain.parallel.shard_tensors import split_tensor
from kdtrain.teacher.signal import HeadLayout

CPU = torch.device("cpu")
VOCAB, SEQUENCES, SEQ_LEN = 299, 8, 12
TEACHER, KD = "qwen3_tied", DistillObjective(divergence="skew_kl", temperature=2.0, kd_weight=0.7, skew=0.3)
Z_LOSS = 1e-3
RATES = (1e-2, 3e-3, 2e-3)  # of the three steps
MAX_NORM, WEIGHT_DECAY, EPS = 0.5, 0.3, 1e-4
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": None}
LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1], "long_factor": [2.0, 5.0]}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0}
SINKS = {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}

FAMILIES = {
    "llama": tiny_config("smollm", tie_word_embeddings=True),  # 3 key/value groups: tp 2 is uneven
    "llama_untied": tiny_config("smollm"),
    "qwen3": tiny_config("qwen3"),
    "qwen3_tied": tiny_config("qwen3", tie_word_embeddings=True),
    "gpt_neox": tiny_config("gpt_neox"),
    "gpt_neox_tied": tiny_config("gpt_neox", tie_word_embeddings=True),
    "qwen2": tiny_config("qwen2"),
    "gemma3": tiny_config("gemma3", sliding_window=4, tie_word_embeddings=True, **WINDOWED),
    "gpt2": tiny_config("gpt2", tie_word_embeddings=True),
    "phi3": tiny_config("phi3"),
    "olmo2": tiny_config("olmo2"),
    "few_groups": tiny_config("llama", num_attention_heads=4, num_key_value_heads=2),
    "one_group": tiny_config("llama", num_key_value_heads=1, tie_word_embeddings=True),
    "one_group_untied": tiny_config("llama", num_attention_heads=4, num_key_value_heads=1),
    # tables change at 8 tokens: documents of 4 and 8 use one, those of 12 another
    "longrope": tiny_config("phi3", original_max_position_embeddings=8, rope_parameters=LONG),
    "dynamic": tiny_config("llama", max_position_embeddings=8, rope_parameters=DYNAMIC),
    "uneven_groups": tiny_config("smollm", num_attention_heads=9, num_key_value_heads=3),
    "sinks": {**tiny_config("llama"), "model_type": "granite_swa", "sliding_window": 4, **SINKS},
}
"""Configs by name. Gemma without its soft cap, which the plain formula lacks (the tests of the losses cover it)."""


@dataclass(frozen=True, slots=True)
class Case:
    """A layout and how each of the three steps is divided into micro-batches.

    family: of FAMILIES. micro: sequences per micro-batch and data rank, by step. teacher: where it lies, as
    `teacher_settings` reads it; without one the loss is plain cross-entropy. attention: of the student; None: with
    masks, as plain torch has it in any case.
    """

    family: str
    tp: int
    stage: Literal[0, 1, 2, 3]
    micro: tuple[int, int, int]
    recompute: bool = False
    dtype: Dtype = "float32"
    teacher: str | None = None
    sequence: bool = False
    cp: int = 1
    attention: str | None = None

    @property
    def name(self) -> str:
        """Name of its folder and in messages, unique among layouts."""
        micro = ".".join(str(m) for m in self.micro)
        flags = ("recompute" * self.recompute, "sequence" * self.sequence)
        words = (*flags, self.teacher, self.attention)
        extras = "".join(f"-{word.replace(' ', '-')}" for word in words if word)
        cp = f"-cp{self.cp}" * (self.cp > 1)
        return f"{self.family}-tp{self.tp}{cp}-zero{self.stage}-{micro}-{self.dtype}{extras}"

    @property
    def what(self) -> tuple[str, bool]:
        """What the steps depend on apart from the layout: the family, and whether there is a teacher."""
        return self.family, self.teacher is not None


def configuration(stage: Literal[0, 1, 2, 3], *, dtype: Dtype = "float32", clip: float | None = MAX_NORM) -> RunConfig:
    """What a StudentEngine reads. clip: the largest gradient norm; None: no clipping."""
    cfg = RunConfig()
    cfg.zero.stage, cfg.student.dtype = stage, dtype
    cfg.optim.eps, cfg.optim.grad_clip, cfg.optim.weight_decay = EPS, clip, WEIGHT_DECAY
    return cfg


def model_spec(folder: Path, family: str, *, attention: str | None = None, **settings: Any) -> ModelSpec:
    """A random model of FAMILIES, attention with masks if it is None; its config is written under `folder`.

    settings: ModelSpec's.
    """
    path = folder / f"{family}.json"
    if not path.exists():  # atomic, because another rank may be reading it
        own = path.with_name(f".{path.name}.{os.getpid()}")
        own.write_text(json.dumps(FAMILIES[family]))
        os.replace(own, path)
    masked = "eager" if family == "sinks" else "sdpa"
    return ModelSpec(architecture=str(path), attention=attention or masked, **settings)


def build_backbone(
    folder: Path,
    family: str,
    mesh: Mesh,
    *,
    teacher: str | None = None,
    sequence: bool = False,
    device: torch.device = CPU,
    **settings: Any,
) -> Backbone:
    """The student, cut for this rank, on `device`. The mesh of one process: plain torch's. settings: model_spec's."""
    spec = model_spec(folder, family, **{"dtype": "float32", "seed": 3, **settings})
    rows = None if teacher is None else head_rows(teacher_settings(mesh, teacher), 301)
    backbone = load_backbone(
        spec, mesh, vocab_size=VOCAB, total_rows=rows, device=device, trainable=True, sequence=sequence
    )
    shift_vectors(backbone)
    return backbone


def teacher_settings(mesh: Mesh, words: str) -> RunConfig:
    """words: tp, tp and a number, or plain; zero3; offload; overlap; limit and a number of tokens."""
    cfg, (layout, *more) = RunConfig(), words.split()
    t, tp = cfg.teacher, layout.removeprefix("tp") if layout != "plain" else ""
    t.layout, t.tp, t.dtype = "plain" if layout == "plain" else "tp", int(tp) if tp else None, "float32"
    t.zero_stage, t.offload, cfg.parallel.tp = 3 if "zero3" in more else 0, "offload" in more, mesh.tp_size
    t.overlap = "overlap" in more
    t.max_tokens_per_forward = next((int(word[5:]) for word in more if word.startswith("limit")), None)
    return cfg


def whole_teacher(folder: Path) -> Backbone:
    """The teacher's decoder in one process: another family than the student's, with another width."""
    return load_backbone(model_spec(folder, TEACHER, dtype="float32"), Mesh(), vocab_size=VOCAB, trainable=False)


def build_teacher(folder: Path, student: Backbone, mesh: Mesh, words: str) -> Any:
    """The same teacher in a layout of its own beside the student, on its device."""
    cfg, spec = teacher_settings(mesh, words), model_spec(folder, TEACHER, dtype="float32")
    return build.build_teacher(cfg, spec, student.shard, mesh, device_of(student))[0]


def device_of(backbone: Backbone) -> torch.device:
    """Where its weights are, or under ZeRO-3 were."""
    return next(backbone.parameters()).device


def shift_vectors(backbone: Backbone) -> None:
    """Move norms and biases away from ones and zeros, alike in all layouts, so that mistakes in them are detected."""
    for name, param in backbone.hf_parameters():
        if param.dim() == 1:
            cut = backbone.cuts.get(name)
            size = backbone.full_shapes()[name][0]
            full = 0.3 * torch.sin(torch.arange(size) + len(name))
            tp_rank = backbone.shard.start // backbone.shard.rows
            param.data += split_tensor(full, cut and replace(cut, padded=None), tp_rank).to(param)


def step_batch(step: int) -> Batch:
    """Eight packed sequences whose counts of valid tokens are 11, 0, 1 and so on; the same in every layout."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (SEQUENCES, SEQ_LEN + 1), generator=generator)
    positions = torch.arange(SEQ_LEN).expand(SEQUENCES, -1).clone()
    positions[::2, 4:] -= 4  # two documents in every other sequence
    valid = torch.tensor([11, 0, 1, 7, 10, 2, 5, 3])
    return Batch(
        input_ids=tokens[:, :-1],
        labels=tokens[:, 1:],
        loss_mask=(torch.arange(SEQ_LEN) < valid[:, None]).float(),
        position_ids=positions,
        sample_ids=torch.arange(SEQUENCES),
        documents=Documents.of(positions),
    )


def micro_batches(batch: Batch, mesh: Mesh, sequences: int) -> list[Batch]:
    """This rank's part of a step, `sequences` at a time."""
    per_rank = SEQUENCES // mesh.dp_size
    mine = batch.rows(mesh.dp_rank * per_rank, (mesh.dp_rank + 1) * per_rank)
    mine = cut_sequences(mine, mesh.cp_rank, mesh.cp_size)
    return [mine.rows(start, min(start + sequences, per_rank)) for start in range(0, per_rank, sequences)]


def objective_of(engine: Any, teacher: Any = None) -> Pretrain | Distill:
    """Cross-entropy, or with a teacher KD; its slabs make several chunks of the tokens."""
    slab_bytes = 16 * engine.backbone.shard.rows * 3
    layout = HeadLayout(engine.backbone.shard, engine.mesh.tp_group, slab_bytes)
    if teacher is None:
        return Pretrain(engine, None, PretrainObjective(), layout)
    return Distill(engine, teacher, KD, layout, z_loss=Z_LOSS)


def make_step(engine: Any, step: int, micro: int, *, teacher: Any = None) -> tuple[float, Any]:
    """(loss per valid token over all ranks with different tokens, StepResult). step counts from 1."""
    batch = step_batch(step).to(device_of(engine.backbone))
    total = float(batch.num_valid_tokens())
    loss = 0.0
    objective, parts = objective_of(engine, teacher), micro_batches(batch, engine.mesh, micro)
    objective.prefetch(parts)
    for part in parts:
        loss_sum = objective(part).loss_sum
        engine.backward(loss_sum, total)
        loss += float(loss_sum.detach()) / total
    result = engine.step(RATES[step - 1])
    losses: list[Any] = [None] * engine.mesh.zero_size
    if engine.mesh.zero_size > 1:
        torch.distributed.all_gather_object(losses, loss, group=engine.mesh.zero_group)
        loss = sum(losses)
    return loss, result


def evaluate(engine: Any, teacher: Any = None) -> float:
    """Nats per valid token of other data, by the whole batch on every data rank."""
    with torch.no_grad(), engine.eval_mode():
        batch, mesh = step_batch(9).to(device_of(engine.backbone)), engine.mesh
        loss_sum = objective_of(engine, teacher)(cut_sequences(batch, mesh.cp_rank, mesh.cp_size)).loss_sum
        assert not loss_sum.requires_grad
        return float(reduce_sum_(loss_sum.clone(), mesh.cp_group)) / float(batch.num_valid_tokens())


def join(world_size: int, device_type: str = "cpu") -> dict[int, Mesh]:
    """The meshes to train on, by tp. device_type: what this rank's device has to be."""
    from kdtrain.engine import bootstrap

    runtime = bootstrap.start()
    assert (runtime.world_size, runtime.device.type) == (world_size, device_type)
    return {tp: Mesh.build(tp) for tp in (1, 2, 4) if world_size % tp == 0}


def student_of(folder: Path, mesh: Mesh, case: Case, device: torch.device = CPU) -> Backbone:
    """The case's student, cut for this rank, on `device`."""
    return build_backbone(
        folder,
        case.family,
        mesh,
        dtype=case.dtype,
        activation_checkpointing=case.recompute,
        teacher=case.teacher,
        sequence=case.sequence,
        device=device,
        attention=case.attention,
    )


def engine_of(
    backbone: Backbone, mesh: Mesh, case: Case, *, clip: float | None = MAX_NORM, offload: bool = False
) -> Any:
    """A StudentEngine on the backbone's device. A teacher in a layout of its own must exist by now. offload: of the
    optimizer."""
    from kdtrain.engine.zero import StudentEngine  # deepspeed takes seconds to import, and most tests need none

    cfg = configuration(case.stage, dtype=case.dtype, clip=clip)
    cfg.zero.offload_optimizer = offload
    return StudentEngine(backbone, mesh, engine_settings(cfg), device=device_of(backbone))


def run_cases(
    rank: int,
    world_size: int,
    folder: Path,
    cases: list[Case],
    teacher_of: Callable[..., Any] = build_teacher,
    device_type: str = "cpu",
) -> list[tuple[list[tuple[float, float]], float]]:
    """Per case (loss and gradient norm of each step, an evaluation); a function for `RankPool.run`.

    Checkpoints after steps 1 and 3, in folder/case.name, hold what else there is to compare. device_type: cpu, or cuda
    in ranks of a pool whose backend is nccl, each with the device of its number.
    """
    meshes = {(tp, 1): mesh for tp, mesh in join(world_size, device_type).items()}
    device = CPU if device_type == "cpu" else torch.device(device_type, rank)
    answers = []
    for case in cases:
        if (case.tp, case.cp) not in meshes:
            meshes[case.tp, case.cp] = Mesh.build(case.tp, case.cp)
        mesh = meshes[case.tp, case.cp]
        backbone = student_of(folder, mesh, case, device)
        teacher = case.teacher and teacher_of(folder, backbone, mesh, case.teacher)
        engine = engine_of(backbone, mesh, case)
        answers.append(three_steps(engine, teacher, case, folder / case.name))
        engine.close()
    return answers


def three_steps(engine: Any, teacher: Any, case: Case, root: Path) -> tuple[list[tuple[float, float]], float]:
    """((loss, gradient norm) of each step, an evaluation at the end); checkpoints of steps 1 and 3 under root."""
    steps = []
    for step in (1, 2, 3):
        loss, result = make_step(engine, step, case.micro[step - 1], teacher=teacher)
        assert result.applied
        steps.append((loss, result.grad_norm))
        if step != 2:
            checkpoint.save(root, engine, step=step, state={})
        else:
            evaluate(engine, teacher)  # in the middle: it must not disturb training
    return steps, evaluate(engine, teacher)
