"""Three optimizer steps under DeepSpeed in many layouts, against plain torch: whole logits, autograd, AdamW."""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdtrain.config.schema import DistillObjective, RunConfig
from kdtrain.data.batch import Batch
from kdtrain.data.context import cut_sequences
from kdtrain.dist.collectives import reduce_sum_
from kdtrain.dist.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.slices import CheckpointReader
from kdtrain.losses.reference import skew_kl
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.models.tiny import tiny_config
from kdtrain.objectives.base import HeadLayout
from kdtrain.objectives.distill import Distill
from kdtrain.objectives.pretrain import Pretrain
from kdtrain.parallel.pieces import split_tensor
from kdtrain.training import build

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

VOCAB, SEQUENCES, SEQ_LEN = 299, 8, 12
TEACHER, KD = "qwen3_tied", DistillObjective(divergence="skew_kl", temperature=2.0, kd_weight=0.7, skew=0.3)
Z_LOSS = 1e-3
RATES = (1e-2, 3e-3, 2e-3)  # of the three steps
ERRORS = ("loss", "norm", "gradient", "weight", "evaluation")
LIMITS = {
    "float32": dict.fromkeys((*ERRORS, "later"), 1e-5),
    "bfloat16": {"loss": 1e-3, "norm": 3e-3, "later": 2e-2, "gradient": 1.5, "weight": 3e-2, "evaluation": 5e-3},
}
"""Largest error by dtype. later: of losses and norms after step 1, whose weights are rounded already. A gradient's in
bfloat16 is a multiple of what rounding does to plain torch in one process."""

FAMILIES = {
    "llama": tiny_config("smollm", tie_word_embeddings=True),  # 3 key/value groups: tp 2 is uneven
    "llama_untied": tiny_config("smollm"),
    "qwen3": tiny_config("qwen3"),
    "qwen3_tied": tiny_config("qwen3", tie_word_embeddings=True),
    "gpt_neox": tiny_config("gpt_neox"),
    "gpt_neox_tied": tiny_config("gpt_neox", tie_word_embeddings=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A layout and how each of the three steps is cut into micro-batches: sequences per micro-batch and data rank."""

    family: str
    tp: int
    stage: int
    micro: tuple[int, int, int]
    recompute: bool = False
    dtype: str = "float32"
    teacher: str | None = None  # its layout; without one the loss is plain cross-entropy
    sequence: bool = False
    cp: int = 1

    def limits(self, want):
        """The largest error of each kind. want: the Oracle."""
        limits = LIMITS[self.dtype]
        return limits if self.dtype == "float32" else {**limits, "gradient": limits["gradient"] * want.rounding}

    @property
    def name(self):
        micro = ".".join(str(m) for m in self.micro)
        words = ("recompute" * self.recompute, "sequence" * self.sequence, self.teacher)
        extras = "".join(f"-{word.replace(' ', '-')}" for word in words if word)
        cp = f"-cp{self.cp}" * (self.cp > 1)
        return f"{self.family}-tp{self.tp}{cp}-zero{self.stage}-{micro}-{self.dtype}{extras}"

    @property
    def what(self):
        """What the steps depend on, and nothing of the layout."""
        return self.family, self.teacher is not None


CASES = {
    1: [
        Case("llama", 1, 0, (8, 8, 8)),
        Case("llama_untied", 1, 1, (1, 1, 1)),
        Case("qwen3_tied", 1, 2, (8, 1, 3)),
        Case("gpt_neox", 1, 3, (1, 8, 3), recompute=True),
        Case("llama", 1, 2, (8, 3, 1), teacher="plain"),
    ],
    2: [
        *(Case("llama", 2, stage, (8, 1, 4)) for stage in (0, 1, 2, 3)),
        *(Case("llama", 1, stage, (4, 1, 3)) for stage in (0, 1, 2, 3)),
        Case("llama_untied", 2, 1, (8, 8, 8), recompute=True),
        Case("qwen3", 2, 2, (1, 1, 8)),
        Case("gpt_neox_tied", 2, 3, (3, 8, 1)),
        *(Case("llama", 2, 1, (8, 1, 3), teacher=layout) for layout in ("plain", "tp", "plain zero3", "tp zero3")),
        *(Case("llama", 1, stage, (4, 1, 3), teacher="tp2") for stage in (1, 3)),
        Case("llama", 1, 0, (4, 1, 3), teacher="plain zero3 offload"),
        Case("llama", 2, 3, (3, 8, 1), teacher="plain"),
        Case("gpt_neox", 2, 1, (8, 1, 3), sequence=True),
        Case("qwen3", 2, 2, (3, 8, 1), sequence=True, recompute=True, teacher="tp"),
        Case("llama", 2, 3, (1, 3, 8), sequence=True, teacher="plain"),
        Case("qwen3", 2, 3, (3, 8, 1), sequence=True, recompute=True, dtype="bfloat16"),
        Case("llama", 1, 0, (4, 1, 3), teacher="plain"),
        Case("llama", 2, 1, (8, 1, 4), dtype="bfloat16"),
        Case("llama_untied", 1, 2, (1, 3, 4), dtype="bfloat16"),
        Case("qwen3", 2, 3, (3, 8, 1), recompute=True, dtype="bfloat16"),
    ],
    4: [
        Case("gpt_neox", 2, 0, (4, 2, 1)),
        Case("llama_untied", 2, 1, (1, 4, 2)),
        Case("qwen3", 2, 2, (2, 4, 3), recompute=True),
        Case("qwen3_tied", 2, 3, (1, 2, 4)),
        Case("llama_untied", 1, 3, (1, 2, 2)),
        Case("llama", 2, 2, (3, 1, 4), teacher="plain"),
        Case("llama", 2, 1, (4, 1, 3), teacher="tp zero3"),
        Case("llama", 2, 3, (4, 2, 1), teacher="tp4"),
        Case("llama", 2, 1, (1, 2, 4), teacher="tp4", sequence=True),
        Case("llama", 4, 1, (3, 1, 8), teacher="tp"),  # nine query heads, two ranks share a key/value head
        Case("llama", 1, 2, (1, 2, 2), teacher="tp4"),
        Case("llama", 1, 1, (2, 1, 2), teacher="tp2 zero3"),
    ],
}


def configuration(stage, *, dtype="float32", clip=0.5):
    cfg = RunConfig()
    cfg.zero.stage, cfg.student.dtype = stage, dtype
    cfg.optim.eps, cfg.optim.grad_clip, cfg.optim.weight_decay = 1e-4, clip, 0.3
    return cfg


def model_spec(folder, family, **settings):
    path = folder / f"{family}.json"
    if not path.exists():  # whole at once: another rank may be reading it
        own = path.with_name(f".{path.name}.{os.getpid()}")
        own.write_text(json.dumps(FAMILIES[family]))
        os.replace(own, path)
    return ModelSpec(architecture=str(path), attention="sdpa", **settings)


def build_backbone(folder, family, mesh, *, dtype="float32", recompute=False, teacher=None, sequence=False):
    spec = model_spec(folder, family, dtype=dtype, activation_checkpointing=recompute)
    rows = None if teacher is None else build.head_rows(teacher_settings(mesh, teacher), 301)
    backbone = load_backbone(spec, mesh, vocab_size=VOCAB, total_rows=rows, trainable=True, seed=3, sequence=sequence)
    shift_vectors(backbone)
    return backbone


def teacher_settings(mesh, words):
    """words: tp, tp and a number, or plain; zero3; offload; overlap; limit and a number of tokens."""
    cfg, (layout, *more) = RunConfig(), words.split()
    t, tp = cfg.teacher, layout.lstrip("plaint")
    t.layout, t.tp, t.dtype = layout.rstrip("0123456789"), int(tp) if tp else None, "float32"
    t.zero_stage, t.offload, cfg.parallel.tp = 3 if "zero3" in more else 0, "offload" in more, mesh.tp_size
    t.overlap = "overlap" in more
    t.max_tokens_per_forward = next((int(word[5:]) for word in more if word.startswith("limit")), None)
    return cfg


def build_teacher(folder, student=None, mesh=None, words=""):
    """Another family than the student's, with another width. Without a student: the decoder alone, for the oracle."""
    spec = model_spec(folder, TEACHER, dtype="float32")
    if student is None:
        return load_backbone(spec, Mesh(), vocab_size=VOCAB, trainable=False)
    cfg = teacher_settings(mesh, words)
    return build.add_teacher(cfg, spec, build.Models(student, None, None, None), mesh, torch.device("cpu")).teacher


def shift_vectors(backbone):
    """Norms and biases away from ones and zeros, alike in all layouts: else a mistake in them would not show."""
    for name, param in backbone.hf_parameters():
        if param.dim() == 1:
            cut = backbone.cuts.get(name)
            size = backbone.full_shapes()[name][0]
            full = 0.3 * torch.sin(torch.arange(size) + len(name))
            tp_rank = backbone.shard.start // backbone.shard.rows
            param.data += split_tensor(full, cut and replace(cut, padded=None), tp_rank).to(param.dtype)


def step_batch(step):
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
    )


def micro_batches(batch, mesh, sequences):
    per_rank = SEQUENCES // mesh.dp_size
    mine = batch.rows(mesh.dp_rank * per_rank, (mesh.dp_rank + 1) * per_rank)
    mine = cut_sequences(mine, mesh.cp_rank, mesh.cp_size)
    return [mine.rows(start, min(start + sequences, per_rank)) for start in range(0, per_rank, sequences)]


def objective_of(engine, teacher=None):
    slab_bytes = 16 * engine.backbone.shard.rows * 3  # several chunks of tokens
    layout = HeadLayout(engine.backbone.shard, engine.mesh.tp_group, slab_bytes)
    return Pretrain(engine, layout) if teacher is None else Distill(engine, teacher, KD, layout, z_loss=Z_LOSS)


def make_step(engine, step, micro, *, teacher=None):
    """(loss per valid token over all ranks with different tokens, StepResult)"""
    batch = step_batch(step)
    total = float(batch.num_valid_tokens())
    loss = 0.0
    objective, parts = objective_of(engine, teacher), micro_batches(batch, engine.mesh, micro)
    objective.begin_step(parts)
    for part in parts:
        loss_sum = objective(part).loss_sum
        engine.backward(loss_sum, total)
        loss += float(loss_sum.detach()) / total
    result = engine.step(RATES[step - 1])
    losses = [None] * engine.mesh.zero_size
    if engine.mesh.zero_size > 1:
        torch.distributed.all_gather_object(losses, loss, group=engine.mesh.zero_group)
        loss = sum(losses)
    return loss, result


def evaluate(engine, teacher=None):
    with torch.no_grad(), engine.eval_mode():
        batch, mesh = step_batch(9), engine.mesh
        loss_sum = objective_of(engine, teacher)(cut_sequences(batch, mesh.cp_rank, mesh.cp_size)).loss_sum
        assert not loss_sum.requires_grad
        return float(reduce_sum_(loss_sum.clone(), mesh.cp_group)) / float(batch.num_valid_tokens())


def join(world_size):
    """The meshes to train on, by tp."""
    from kdtrain.engine import bootstrap

    assert bootstrap.start().world_size == world_size
    return {tp: Mesh.build(tp) for tp in (1, 2, 4) if world_size % tp == 0}


def start_engine(folder, mesh, case, **settings):
    from kdtrain.engine.zero import StudentEngine

    backbone = build_backbone(folder, case.family, mesh, dtype=case.dtype, recompute=case.recompute)
    cfg = configuration(case.stage, dtype=case.dtype, **settings)
    return StudentEngine(backbone, mesh, cfg, device=torch.device("cpu"))


def run_cases(rank, world_size, folder, cases):
    """Per case: losses, gradient norms, an evaluation. Checkpoints after steps 1 and 3 hold what else there is."""
    from kdtrain.engine.zero import StudentEngine

    meshes = join(world_size)
    answers = []
    for case in cases:
        mesh = meshes[case.tp] if case.cp == 1 else meshes.setdefault((case.tp, case.cp), Mesh.build(case.tp, case.cp))
        backbone = build_backbone(
            folder, case.family, mesh, dtype=case.dtype, recompute=case.recompute, teacher=case.teacher,
            sequence=case.sequence,
        )  # fmt: skip
        teacher = case.teacher and build_teacher(folder, backbone, mesh, case.teacher)
        engine = StudentEngine(backbone, mesh, configuration(case.stage, dtype=case.dtype), device=torch.device("cpu"))
        root = folder / case.name
        steps = []
        for step in (1, 2, 3):
            loss, result = make_step(engine, step, case.micro[step - 1], teacher=teacher)
            assert result.applied
            steps.append((loss, result.grad_norm))
            if step != 2:
                checkpoint.save(root, engine, step=step, state={})
            else:
                evaluate(engine, teacher)  # in the middle: it must not disturb training
        answers.append((steps, evaluate(engine, teacher)))
        engine.close()
    return answers


@dataclass(slots=True)
class Oracle:
    """What plain torch says: per step loss and norm, step 1's clipped gradients, the final weights and evaluation.

    rounding: by how much, relatively, step 1's worst gradient differs when the student is in bfloat16.
    """

    steps: list
    grads: dict
    weights: dict
    evaluation: float
    rounding: float


def logits_of(backbone, batch):
    return F.linear(backbone.hidden_states(batch), backbone.lm_head_shard.weight[:VOCAB]).float()


def loss_of(backbone, teacher, batch):
    logits = logits_of(backbone, batch)
    losses = F.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    if teacher is not None:
        kd = skew_kl(logits, logits_of(teacher, batch), temperature=2.0, skew=0.3, dtype=torch.float32)
        losses = 0.7 * 4.0 * kd + 0.3 * losses + Z_LOSS * logits.logsumexp(-1).square()
    return (losses * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()


def rounding_error(folder, family, teacher, grads):
    """Worst relative error of a gradient, in the 2-norm, of one process of plain torch in bfloat16."""
    backbone = build_backbone(folder, family, Mesh(), dtype="bfloat16")
    loss_of(backbone, teacher, step_batch(1)).backward()
    torch.nn.utils.clip_grad_norm_(backbone.parameters(), 0.5)
    return max(float((p.grad - grads[name]).norm() / grads[name].norm()) for name, p in backbone.hf_parameters())


def oracle(folder, family, distils):
    teacher = build_teacher(folder) if distils else None
    backbone = build_backbone(folder, family, Mesh())
    named = dict(backbone.hf_parameters())
    matrices = [p for p in named.values() if p.dim() > 1]
    vectors = [p for p in named.values() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4)
    found = Oracle([], {}, {}, 0.0, 0.0)
    for step, rate in enumerate(RATES, 1):
        adam.zero_grad()
        loss = loss_of(backbone, teacher, step_batch(step))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
        assert norm > 0.6, "clipping would not be tested"
        found.steps.append((loss.item(), norm.item()))
        if step == 1:
            found.grads = {name: param.grad.clone() for name, param in named.items()}
        for group in adam.param_groups:
            group["lr"] = rate
        adam.step()
    with torch.no_grad():
        found.evaluation = float(loss_of(backbone, teacher, step_batch(9)))
    found.weights = {name: param.detach().clone() for name, param in named.items()}
    found.rounding = rounding_error(folder, family, teacher, found.grads)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.fixture(scope="module")
def oracles(folder):
    return {what: oracle(folder, *what) for what in {case.what for cases in CASES.values() for case in cases}}


def check_case(case, answer, want: Oracle, root: Path):
    steps, evaluation = answer
    limits = case.limits(want)
    for number, ((loss, norm), (right_loss, right_norm)) in enumerate(zip(steps, want.steps, strict=True), 1):
        names = ("loss", "norm") if number == 1 else ("later", "later")
        assert loss == pytest.approx(right_loss, rel=limits[names[0]]), f"{case.name}: loss of step {number}"
        assert norm == pytest.approx(right_norm, rel=limits[names[1]]), f"{case.name}: gradient norm of step {number}"
    assert evaluation == pytest.approx(want.evaluation, rel=limits["evaluation"]), case.name
    with CheckpointReader(root / "step_000001") as first, CheckpointReader(root / "step_000003") as last:
        assert sorted(first.names()) == sorted(want.weights)
        for name in first.names():
            rows = first.manifest.parameters[name].shape[0]  # the rest is padding of a vocabulary
            grad, right = first.read_full(name, "exp_avg") / (1 - 0.9), want.grads[name][:rows]
            scale = float(right.norm())
            assert scale > 1e-3, f"{case.name}: {name} has no gradient to compare"
            error = float((grad - right).norm()) / scale
            assert error < limits["gradient"], f"{case.name}: gradient of {name} is off by {error:.1e}"
            error = float((last.read_full(name, "master") - want.weights[name][:rows]).abs().max())
            assert error < limits["weight"], f"{case.name}: {name} after three steps is off by {error:.1e}"


@pytest.mark.parametrize("world_size", CASES)
def test_every_layout_makes_the_steps_of_plain_torch(world_size, fresh_pool, folder, oracles):
    answers = fresh_pool(world_size).run(run_cases, timeout_s=400, folder=folder, cases=CASES[world_size])
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(CASES[world_size], answers[0], strict=True):
        check_case(case, answer, oracles[case.what], folder / case.name)
