"""A new objective is its file, its traits row and its section of settings, besides tests, recipes and docs.

The tree is copied, a toy objective is added to the copy, and the copy's own scripts are run.
"""

import sys
from functools import partial

import pytest
import torch

from kdtrain.config.load import load_run
from kdtrain.distributed.mesh import Mesh
from kdtrain.jobs.build.batches import build_loader
from kdtrain.jobs.build.models import build_models, model_specs
from kdtrain.jobs.inputs import open_inputs
from kdtrain.losses import reference
from kdtrain.models.tiny import tiny_config
from tests.support.launching import read_metrics, run_command
from tests.support.tiny_run import write_run
from tests.support.tree_copy import changed_files, copy_tree, tree_environment

pytestmark = [pytest.mark.deepspeed, pytest.mark.slow]

GAMMA, CPU = 0.5, torch.device("cpu")
IMPLEMENTATION = '''
"""Cross-entropy on the data, each token weighted with the teacher's probability of its label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.schema.objective import ConfidentObjective
from kdtrain.distributed.vocab import HeadShard
from kdtrain.losses import LossParts, divergence_spec
from kdtrain.models.student import Student
from kdtrain.objectives.base import LossOutput, require_source, summed_metrics
from kdtrain.teacher.signal import HeadLayout
from kdtrain.teacher.signal_loss import LossWeights, signal_loss
from kdtrain.teacher.source import SignalSource


class Confident:
    """p_teacher(label)^gamma CE(data) + z_loss lse^2, summed over valid tokens."""

    def __init__(
        self,
        student: Student,
        source: SignalSource | None,
        settings: ConfidentObjective,
        layout: HeadLayout,
        *,
        z_loss: float = 0.0,
    ) -> None:
        self.student, self._source = student, require_source(source, "confident")
        self._gamma, self._layout, self._z_loss = settings.gamma, layout, z_loss
        self._divergence = divergence_spec("forward_kl")

    def prefetch(self, micro_batches: Sequence[Batch]) -> None:
        """Announce them to the source."""
        self._source.prefetch(micro_batches)

    def __call__(self, batch: Batch, *, measure: bool = False) -> LossOutput:
        """Loss of one micro-batch."""
        signal, layout = self._source.signal(batch), self._layout
        mask = batch.loss_mask.reshape(-1)
        none, z = torch.zeros_like(mask), mask * self._z_loss if self._z_loss else None

        def head_fn(hidden: Tensor, head: HeadShard) -> LossParts:
            with torch.no_grad():
                weights = LossWeights(none, mask)
                known = signal_loss(hidden, head, signal, batch, weights, self._divergence, layout)
            weights = LossWeights(none, mask * torch.exp(-self._gamma * known.teacher_ce), z)
            return signal_loss(hidden, head, signal, batch, weights, self._divergence, layout)

        parts = self.student(batch, head_fn)
        return LossOutput(parts.loss, summed_metrics(parts, mask, self._z_loss))
'''
TRAITS = """    "confident": ObjectiveTraits("kdtrain.objectives.confident:Confident", signals=("dense",)),
"""
SECTION = '''@dataclass(kw_only=True, slots=True)
class ConfidentObjective(ObjectiveSettings):
    """Cross-entropy, each token weighted with the teacher's probability of its label."""

    gamma: float = 1.0
    """Exponent of the teacher's probability, in [0, 10]; 0 is plain cross-entropy."""

    def problems(self) -> Iterator[tuple[str, str, str]]:
        """Its range."""
        if not 0 <= self.gamma <= 10:
            yield "gamma", "is not in [0, 10]", "1 weights with the probability itself"


'''
FIELD = '''    confident: ConfidentObjective = field(default_factory=ConfidentObjective)
    """Settings of objective confident."""
'''
RECIPE = f"""
objective:
  name: confident
  confident:
    gamma: {GAMMA}
"""


def edit(path, old, new):
    """Replace what occurs once."""
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new), encoding="utf-8")


def add_objective(tree):
    (tree / "kdtrain/objectives/confident.py").write_text(IMPLEMENTATION.lstrip(), encoding="utf-8")
    end = '}\n"""Value of objective.name -> its traits."""'
    edit(tree / "kdtrain/config/objectives.py", end, TRAITS + end)
    schema, section = (
        tree / "kdtrain/config/schema/objective.py",
        "@dataclass(kw_only=True, slots=True)\nclass Objective",
    )
    edit(schema, section + "Section:", SECTION + section + "Section:")
    edit(schema, 'name: Literal["pretrain", "distill"]', 'name: Literal["pretrain", "distill", "confident"]')
    schema.write_text(schema.read_text(encoding="utf-8") + FIELD, encoding="utf-8")
    (tree / "configs/confident.yaml").write_text(RECIPE, encoding="utf-8")


def expected_first_step(config):
    """(loss per valid token, gradient norm) of the first step by whole logits in float64 and autograd."""
    cfg = load_run([str(config)]).config
    inputs = open_inputs(cfg, model_specs(cfg))
    models = build_models(cfg, inputs, Mesh(), CPU, trainable=True)
    student, teacher, vocab = models.student.double(), models.teacher_backbone.double(), inputs.vocab_size
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for batch in next(build_loader(cfg, inputs, Mesh(), prefetch=0)):
        logits = [
            torch.nn.functional.linear(model.hidden_states(batch), model.lm_head_shard.weight[:vocab])
            for model in (student, teacher)
        ]
        ce, teacher_ce = (reference.cross_entropy(each, batch.labels.flatten()) for each in logits)
        loss = loss + (batch.loss_mask.flatten() * torch.exp(-GAMMA * teacher_ce) * ce).sum()
        count += int(batch.loss_mask.sum())
    (loss / count).backward()
    norm = torch.stack([param.grad.norm() for _, param in student.hf_parameters()]).norm()
    return float(loss.detach()) / count, float(norm)


def test_a_new_objective_touches_three_files_and_trains(tmp_path):
    objective = {"name": "distill", "distill": {}}
    models = {"student": tiny_config("qwen3"), "teacher": tiny_config("llama")}
    config = write_run(tmp_path / "world", **models, steps=3, run={"name": "toy"}, objective=objective)
    tree = copy_tree(tmp_path / "tree")
    add_objective(tree)
    changed = changed_files(tree)
    assert "kdtrain/objectives/confident.py" in changed
    assert len(changed) <= 3, changed
    python = partial(run_command, sys.executable, env=tree_environment(tree), folder=tree)
    recipe, train = tree / "configs/confident.yaml", tree / "launch/train.py"

    page = python("-m", "kdtrain.config.explain")
    assert "| `objective.confident.gamma` | a number | `1.0` | Exponent of the teacher's probability" in page.out
    (tree / "docs/configuration.md").write_text(page.out, encoding="utf-8")

    refused = python(train, config, recipe, "objective.confident.gamma=-1", "--check")
    assert refused.code == 2
    assert "objective.confident.gamma = -1.0" in refused.err
    assert "is not in [0, 10]" in refused.err
    refused = python(train, config, "objective.confident.gamma=2", "--check")
    assert "objective.confident.gamma = 2.0" in refused.err
    assert "would be ignored: objective.name = distill" in refused.err

    checked = python(train, config, recipe, "--check")
    assert checked.code == 0, checked.out + checked.err
    assert f"gamma {GAMMA}" in checked.out

    done = python(train, config, recipe)
    assert done.code == 0, done.out + done.err
    first, *_, last = read_metrics(tmp_path / "world/runs/toy")
    loss, norm = expected_first_step(config)
    assert first["loss/total"] == pytest.approx(loss, rel=1e-5)
    assert first["optim/grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert last["loss/total"] != first["loss/total"]

    laws = [tree / f"tests/unit/{name}.py" for name in ("test_objectives", "test_config_every_field_read")]
    own = python("-m", "pytest", "-q", *laws)
    assert own.code == 0, own.out + own.err
