"""The measured loss of a teacher without its <bos>, and the decision of a run, are the same in every layout."""

import pytest
import torch

from kdtrain.config.load import load_run
from kdtrain.distributed.mesh import Mesh
from kdtrain.errors import ConfigError
from kdtrain.jobs.build.models import build_models, model_specs
from kdtrain.jobs.inputs import open_inputs
from kdtrain.jobs.sequence_prefix import decide_prefix, measure_prefixes, nll_function, prefix_choice
from tests.support.bos_models import BOS, write_bos_run

pytestmark = [pytest.mark.dist, pytest.mark.deepspeed]

CPU = torch.device("cpu")
ALONE = "teacher.weights=null objective.name=pretrain student.architecture=null student.weights={folder}/needs"
LAYOUTS = (
    # settings of the layout, and those that change what is measured
    ("parallel.tp=1 data.sequences_per_micro_batch=3", ""),
    ("parallel.tp=2", ""),
    ("parallel.tp=2 teacher.layout=tp teacher.max_tokens_per_forward=32", ""),
    ("teacher.layout=tp teacher.tp=2", ""),
    ("parallel.cp=2", ""),
    ("teacher.zero_stage=3", ""),
    ("parallel.tp=2 teacher.overlap=true", ""),
    ("parallel.tp=2 parallel.sequence=true", ALONE),
    ("", "data.reset_positions=false"),
)


def measure(rank, world_size, folder):
    """Per layout what was measured, what auto takes, and the message that refuses none."""
    from kdtrain.engine import bootstrap

    if world_size > 1:
        assert bootstrap.start().world_size == world_size
    found = []
    for layout, what in LAYOUTS:
        words = [*what.format(folder=folder).split(), *(layout.split() if world_size > 1 else ())]
        cfg = load_run([str(folder / "run.yaml"), *words]).config
        inputs, mesh = open_inputs(cfg, model_specs(cfg)), Mesh.build(cfg.parallel.tp, cfg.parallel.cp)
        models = build_models(cfg, inputs, mesh, CPU, trainable=True)
        measured = measure_prefixes(nll_function(models), [(), (BOS,)], inputs.train, cfg, mesh, CPU)
        taken = decide_prefix(cfg, prefix_choice(cfg, inputs), inputs, models, mesh, CPU)
        cfg.data.sequence_prefix = "none"
        try:
            decide_prefix(cfg, prefix_choice(cfg, inputs), inputs, models, mesh, CPU)
            refused = None
        except ConfigError as error:
            refused = str(error)
        found.append((measured.nll[()], measured.nll[(BOS,)], measured.num_tokens, taken, refused))
    return found


@pytest.mark.slow
def test_all_layouts_measure_the_same_and_all_ranks_decide_the_same(fresh_pool, tmp_path):
    write_bos_run(tmp_path)
    expected = measure(0, 1, tmp_path)
    answers = fresh_pool(2).run(measure, folder=tmp_path)
    assert answers[0] == answers[1]
    for (layout, what), (without, with_bos, count, taken, refused), one in zip(
        LAYOUTS, answers[0], expected, strict=True
    ):
        assert (without, with_bos) == pytest.approx(one[:2], rel=2e-5), layout
        assert without > with_bos + 3, layout
        assert (count, taken) == (one[2], (BOS,)), layout
        assert (refused is None) == (what == ALONE), layout
        assert refused is None or "is worse than '<bos>' (id 257)" in refused
