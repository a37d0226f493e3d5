"""Teachers with overlap, on process groups of their own, or with a token limit, against plain torch in all layouts."""

import pytest
import torch

from tests.support.layout_oracle import check_case, oracle
from tests.support.layout_steps import Case, build_backbone, build_teacher, join, run_cases, step_batch
from tests.support.tiers import slow_cases

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]


def cases(world_size):
    """A sequence has 11 tokens; micro-batches of step 2 are single sequences, so that there are several."""
    layouts = {
        2: [
            (2, 1, (8, 1, 3), "plain overlap"),
            (2, 2, (8, 1, 3), "tp overlap limit22"),
            (1, 3, (4, 1, 3), "tp2 overlap"),
            (1, 0, (4, 1, 3), "plain zero3 limit33"),
            (2, 1, (8, 3, 4), "plain limit11"),
            (1, 1, (2, 1, 4), "tp2 zero3 limit22"),
        ],
        4: [(2, 2, (4, 1, 3), "tp4 overlap"), (2, 1, (4, 1, 3), "tp zero3 limit11")],
    }[world_size]
    contexts = {
        2: [Case("qwen3", 1, 1, (8, 1, 3), cp=2, teacher="plain overlap limit18")],
        4: [Case("qwen3", 2, 2, (8, 1, 3), cp=2, teacher="tp overlap")],
    }[world_size]
    return [*(Case("llama", tp, stage, micro, teacher=words) for tp, stage, micro, words in layouts), *contexts]


def run(rank, world_size, folder):
    return run_cases(rank, world_size, folder, cases(world_size))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ahead")


@pytest.fixture(scope="module")
def oracles(folder):
    return {family: oracle(folder, family, True) for family in ("llama", "qwen3")}


@pytest.mark.parametrize("world_size", slow_cases([2, 4], 4))
def test_overlap_and_token_limits_equal_plain_torch(world_size, fresh_pool, folder, oracles):
    answers = fresh_pool(world_size).run(run, folder=folder)
    for rank in range(world_size):
        assert answers[rank] == answers[0], "ranks disagree about a loss or a norm"
    for case, answer in zip(cases(world_size), answers[0], strict=True):
        check_case(case, answer, oracles[case.family], folder / case.name)


def groups_in_use(rank, world_size, folder):
    """Per layout of an overlapping teacher: its number of groups, and how many it shares with student and loss."""
    meshes = join(world_size)
    found = {}
    for tp, words in ((2, "plain overlap"), (2, "tp overlap"), (1, "tp2 overlap")):
        mesh = meshes[tp]
        backbone = build_backbone(folder, "llama", mesh, teacher=words)
        teacher = build_teacher(folder, backbone, mesh, words)
        theirs = {getattr(module, "group", None) for module in teacher.backbone.modules()} - {None}
        if teacher.gathers_over is not None:
            theirs.add(teacher.gathers_over)
        signal = teacher.signal(step_batch(1).rows(0, 2))
        ours = {mesh.tp_group, mesh.dp_group, mesh.world_group}
        if signal._resharding is not None:
            ours |= {signal._resharding.group, signal._resharding.replicas}
        found[tp, words] = len(theirs), len(theirs & ours), torch.isfinite(signal.hidden_states).all().item()
    return found


def test_an_overlapping_teacher_shares_no_group_with_student_and_loss(fresh_pool, tmp_path):
    for found in fresh_pool(2).run(groups_in_use, folder=tmp_path):
        assert found == {
            (2, "plain overlap"): (1, 0, True),
            (2, "tp overlap"): (1, 0, True),
            (1, "tp2 overlap"): (1, 0, True),
        }
