"""A divergence with a parameter, added to a copy of the repository by changes of three files, works everywhere."""

import re
import sys

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.launching import numbers_of, run_command
from tests.support.tiny_run import write_run
from tests.support.tree_copy import changed_files, copy_tree, tree_environment

pytestmark = [pytest.mark.slow, pytest.mark.deepspeed]

KERNELS = "kernels/kdtrain_kernels/divergences.py"
DEFINITIONS = "kdtrain/losses/reference.py"
SETTINGS = "kdtrain/config/schema/objective.py"
NEW_CODE = {
    KERNELS: {
        "\n\ndef _logit_mse(": '''

def _le_cam(spec: DivergenceSpec, block: PairBlock) -> Terms:
    """phi = (p - q)^2 / (2 m) with m = share p + (1 - share) q."""
    share = spec["le_cam_share"]
    p, q = block.p(), block.q()
    m = torch.mul(p, share, out=block.spare()).add_(q, alpha=1 - share).clamp_(min=torch.finfo(q.dtype).tiny)
    gap = p.sub_(q)
    ratio = torch.div(gap, m, out=block.spare(1))
    value = gap.mul_(ratio).sum(1) / 2
    # q d phi / d q = -q r (1 + (1 - share) r / 2) with r = (p - q) / m
    return value, (ratio * (1 - share) / 2).add_(1).mul_(ratio).mul_(q).neg_()


def _logit_mse(''',
        '    "logit_mse": Divergence(': """    "le_cam": Divergence(
        terms=_le_cam, parameters={"le_cam_share": Parameter(0.5, 0, 1, "()")}, f_divergence=True
    ),
    "logit_mse": Divergence(""",
    },
    DEFINITIONS: {
        "\n\ndef logit_mse(": '''

def le_cam(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    le_cam_share: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """sum (p - q)^2 / (2 m) with m = share p + (1 - share) q. Le Cam 1986; share -> 0 gives half of Pearson's."""
    log_q, log_p = _log_pair(student_logits, teacher_logits, temperature, dtype)
    p, q = log_p.exp(), log_q.exp()
    return ((p - q).square() / (le_cam_share * p + (1 - le_cam_share) * q)).sum(-1) / 2


def logit_mse(''',
        '    "logit_mse": logit_mse,': '    "le_cam": le_cam,\n    "logit_mse": logit_mse,',
        '    "tvd": lambda p, q: (p - q).abs() / 2,\n': """    "tvd": lambda p, q: (p - q).abs() / 2,
    "le_cam": lambda p, q, le_cam_share=0.5: (p - q).square() / (2 * (le_cam_share * p + (1 - le_cam_share) * q)),
""",
    },
    SETTINGS: {
        '"alpha_beta", "logit_mse"]': '"alpha_beta", "le_cam", "logit_mse"]',
        'exponent of the student; at least 0.01 in size."""\n': '''exponent of the student; at least 0.01 in size."""
    le_cam_share: float = _parameter(0.5, ParameterOf(divergences=("le_cam",), low=0, high=1, fix="0.5 is Le Cam's"))
    """le_cam: share of the teacher in the mixture, in (0, 1)."""
''',
    },
    "tests/support/loss_cases.py": {
        "for name in reference.DIVERGENCES] + [\n": """for name in reference.DIVERGENCES] + [
    ("le_cam", {"le_cam_share": 0.3}),
"""
    },
}
"""File -> text -> what replaces it. The last one is the one row that the tests need."""
GENERIC_TESTS = (
    *("losses_divergences", "losses_streamed", "losses_laws", "losses_reference", "losses_sparse", "losses_extras"),
    *("losses_sparse_refusals", "config_explain", "config_every_field_read", "config_checks"),
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The copy with the new divergence, and its page of settings."""
    folder = copy_tree(tmp_path_factory.mktemp("tree"))
    for name, changes in NEW_CODE.items():
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    page = run_in(folder, "-m", "kdtrain.config.explain")
    (folder / "docs/configuration.md").write_text(page, encoding="utf-8")
    return folder


def run_in(tree, *words, code=0):
    """What python prints with the copy's modules."""
    done = run_command(sys.executable, *words, env=tree_environment(tree), folder=tree)
    assert done.code == code, done.out + done.err
    return done.out + done.err


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    objective = {"name": "distill", "distill": {"divergence": "le_cam", "temperature": 2.0}}
    return write_run(folder, student=tiny_config("llama"), teacher=tiny_config("qwen3"), steps=3, objective=objective)


def test_three_files_change_outside_tests_and_docs(tree):
    assert changed_files(tree) == sorted([KERNELS, DEFINITIONS, SETTINGS])


def test_generic_tests_of_divergences_pass_on_it(tree):
    files = [f"tests/unit/test_{name}.py" for name in GENERIC_TESTS]
    found = run_in(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "le_cam or config or tables", *files)
    assert int(re.search(r"(\d+) passed", found)[1]) > 60, found


def test_check_refuses_values_outside_its_range_and_parameters_of_other_divergences(tree, config):
    words = (tree / "launch/train.py", config, "run.name=checked", "--check")
    found = run_in(tree, *words, "objective.distill.le_cam_share=1.0", code=2)
    assert "objective.distill.le_cam_share = 1.0" in found
    assert "is not in (0, 1)" in found
    found = run_in(tree, *words, "objective.distill.skew=0.3", code=2)
    assert "objective.distill.skew = 0.3" in found
    assert "would be ignored: objective.distill.divergence = le_cam" in found
    found = run_in(tree, *words, "objective.distill={divergence: jsd, le_cam_share: 0.3}", code=2)
    assert "use the divergence le_cam" in found
    assert "le_cam, temperature 2" in run_in(tree, *words, "objective.distill.le_cam_share=0.3")


def test_training_uses_it_with_its_parameter(tree, config):
    kd = {}
    for share in (0.3, 0.9):
        run_in(tree, tree / "launch/train.py", config, f"run.name=s{share}", f"objective.distill.le_cam_share={share}")
        kd[share] = [record["loss/kd"] for record in numbers_of(config.parent / f"runs/s{share}")]
        assert len(kd[share]) == 3
        assert all(value > 0 for value in kd[share])
    assert kd[0.3][0] != kd[0.9][0]
