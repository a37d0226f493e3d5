"""The checkpoint that a run starts from, by run.resume and its folder, with real checkpoints of two numbers."""

import copy
import shutil

import pytest
import torch

from kdtrain.config.load import as_dict
from kdtrain.config.schema import RunConfig
from kdtrain.data.tokenizer import load_tokenizer
from kdtrain.distributed.mesh import Mesh
from kdtrain.engine import checkpoint
from kdtrain.engine.manifest import KINDS
from kdtrain.engine.slices import Fragment
from kdtrain.errors import CheckpointError, ConfigError, StoreMismatch
from kdtrain.jobs.inputs import Inputs
from kdtrain.jobs.resume import find_resume_point
from kdtrain.jobs.sequence_prefix import PrefixChoice
from kdtrain.jobs.start import find_start, kept_prefix
from kdtrain.training.cadence import Cadence
from kdtrain.training.config_changes import config_changes
from kdtrain.training.progress import Progress
from kdtrain.training.trainer import step_seed
from tests.support.tiny_data import write_store, write_tokenizer


def write(run, step, origin=None, **more):
    state = {"origin": origin, "progress": {"tokens_seen": 10 * step}, **more}
    about = checkpoint.Description(step, {"norm.weight": (2,)}, {}, {"tp": 1}, {"model_type": "none"}, state)
    fragments = [Fragment("norm.weight", kind, 0, 0, torch.full((2,), float(step))) for kind in KINDS]
    return checkpoint.write_checkpoint(run / "checkpoints", Mesh(), about, fragments, {"norm.weight": step})


def damage(folder):
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])


def resume(run, how="auto", stage=None):
    cfg = RunConfig()
    cfg.run.resume = str(how)
    cfg.run.continue_from = None if stage is None else str(stage)
    return find_resume_point(cfg, run)


def test_auto_takes_the_newest_complete_checkpoint_or_none(tmp_path):
    assert resume(tmp_path) is None
    old, new = write(tmp_path, 2), write(tmp_path, 6)
    assert resume(tmp_path).path == new
    damage(new)
    assert resume(tmp_path).path == old


@pytest.mark.parametrize("how", ["auto", "never", "path"])
def test_folder_with_only_damaged_checkpoints_is_refused(tmp_path, how):
    elsewhere = write(tmp_path / "other", 1)
    damage(write(tmp_path / "run", 2))
    with pytest.raises(CheckpointError, match=r"holds checkpoints, and none of them is complete(.|\n)*fix: "):
        resume(tmp_path / "run", elsewhere if how == "path" else how)


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path):
    assert resume(tmp_path, "never") is None
    write(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"exists, but run.resume = never"):
        resume(tmp_path, "never")


def test_path_starts_a_run_and_the_same_command_resumes_it(tmp_path):
    source = write(tmp_path / "source", 5)
    for named in (source, tmp_path / "source"):
        found = resume(tmp_path / "run", named)
        assert found.path == source.resolve()
        assert found.origin["step"] == 5
    own = write(tmp_path / "run", 6, found.origin)
    assert resume(tmp_path / "run", source).path == own
    assert resume(tmp_path / "run", source).origin == found.origin
    assert resume(tmp_path / "run").origin == found.origin, "auto must carry it on too"


@pytest.mark.parametrize("what_happened", ["it went on", "it is gone"])
def test_same_command_resumes_after_its_origin_was_removed_or_moved_on(tmp_path, what_happened):
    source, run = write(tmp_path / "source", 5), tmp_path / "run"
    named = tmp_path / "source" if what_happened == "it went on" else source
    own = write(run, 6, resume(run, named).origin)
    if what_happened == "it went on":
        write(tmp_path / "source", 7)
    else:
        shutil.rmtree(tmp_path / "source")
    assert resume(run, named).path == own


@pytest.mark.parametrize("how", ["auto", "never"])
def test_stage_starts_at_a_checkpoint_and_the_same_command_resumes_it(how, tmp_path):
    source = write(tmp_path / "source", 5, {"path": "before"})
    for named in (source, tmp_path / "source"):
        found = resume(tmp_path / "run", how, named)
        assert (found.path, found.is_stage) == (source.resolve(), True)
        assert {key: found.origin[key] for key in ("is_stage", "step", "tokens_seen", "origin")} == {
            "is_stage": True,
            "step": 5,
            "tokens_seen": 50,
            "origin": {"path": "before"},
        }
    own = write(tmp_path / "run", 1, found.origin)
    shutil.rmtree(tmp_path / "source")
    again = resume(tmp_path / "run", "auto", tmp_path / "source")
    assert (again.path, again.is_stage, again.origin) == (own, False, found.origin)
    assert resume(tmp_path / "run").origin == found.origin, "auto alone must carry it on too"
    with pytest.raises(ConfigError, match=r"exists, but run.resume = never"):
        resume(tmp_path / "run", "never", tmp_path / "source")


def test_run_folder_of_another_origin_than_the_stage_is_refused(tmp_path):
    source, own = write(tmp_path / "source", 5), write(tmp_path / "run", 9)
    with pytest.raises(
        ConfigError, match=r"run.continue_from = .* \(step 5\), but this run folder holds .*step_000009"
    ):
        resume(tmp_path / "run", stage=source)
    with pytest.raises(
        ConfigError, match=r"fix: choose another run.name, or set run.resume=auto and run.continue_from"
    ):
        resume(tmp_path / "run", stage=own)
    write(tmp_path / "resumed", 6, resume(tmp_path / "resumed", source).origin)
    with pytest.raises(ConfigError, match=r"of a run that began from .*source/checkpoints/step_000005\n"):
        resume(tmp_path / "resumed", stage=source)
    write(tmp_path / "stage", 6, resume(tmp_path / "stage", stage=source).origin)
    with pytest.raises(ConfigError, match=r"of a run that began from .*step_000005 as a new stage\n"):
        resume(tmp_path / "stage", source)
    with pytest.raises(CheckpointError, match=r"run.continue_from = .*: no complete checkpoint there"):
        resume(tmp_path / "new", stage=tmp_path)


def test_stage_on_another_tokenizer_is_refused(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    other = write_tokenizer(tmp_path / "other", lowercase=True)
    source = write(tmp_path / "source", 5)
    stores = [write_store(tmp_path / f"store{n}", [[1, 2, 3]], t) for n, t in enumerate((tokenizer, other))]
    cfg = RunConfig()
    cfg.run.continue_from = str(source)
    same, different = (Inputs((store,), None, 257, 257) for store in stores)
    with pytest.raises(StoreMismatch, match=r"source/model has no tokenizer.json(.|\n)*fix: "):
        find_start(cfg, same, tmp_path / "run")
    shutil.copytree(tokenizer, tmp_path / "source/model")
    with pytest.raises(
        StoreMismatch, match=r"was trained on another tokenizer than that of .*store1: .* is \[(.|\n)*fix"
    ):
        find_start(cfg, different, tmp_path / "run")


@pytest.mark.parametrize(
    ("configured", "model", "kept"),
    [(None, None, (7,)), (None, "student", (7,)), (None, "teacher", None), ((), None, None), ((9,), "teacher", None)],
)
def test_stage_keeps_the_prefix_without_a_teacher_or_an_explicit_prefix(tmp_path, configured, model, kept):
    source = write(tmp_path / "source", 5, loader={"sequence_prefix": [7]})
    choice = PrefixChoice(configured, (), model, load_tokenizer(write_tokenizer(tmp_path / "tokenizer")))
    stage = resume(tmp_path / "run", stage=source)
    assert kept_prefix(stage, choice) == kept
    assert kept_prefix(resume(tmp_path / "source"), choice) == (7,), "a resumed run is held against it in any case"
    assert kept_prefix(None, choice) is None


def test_path_that_is_not_the_origin_of_the_run_is_refused(tmp_path):
    source, own = write(tmp_path / "source", 5), write(tmp_path / "run", 9)
    with pytest.raises(
        ConfigError, match=r"\(step 5\), but this run folder holds .*step_000009\n.*from scratch(.|\n)*fix: "
    ):
        resume(tmp_path / "run", source)
    assert resume(tmp_path / "run", own).path == own


def test_older_checkpoint_of_the_same_run_is_refused_but_starts_another_run(tmp_path):
    older, newest = write(tmp_path / "run", 3), write(tmp_path / "run", 9)
    with pytest.raises(
        ConfigError,
        match=r"older checkpoint of this run, whose newest is .*step_000009(.|\n)*fix: to go back to step 3",
    ):
        resume(tmp_path / "run", older)
    assert resume(tmp_path / "run").path == newest
    assert resume(tmp_path / "back", older).path == older.resolve()


def test_path_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no complete checkpoint there"):
        resume(tmp_path / "run", tmp_path)


def test_config_changes_lists_only_settings_that_change_the_result():
    before = as_dict(RunConfig())
    after = copy.deepcopy(before)
    after["parallel"]["tp"] = 8
    after["run"]["name"] = "another"
    after["data"]["sequences_per_micro_batch"] = 3
    after["data"]["train"] = ["moved/two", "moved/one"]
    after["data"]["train_weights"] = [2.0, 1.0]
    assert config_changes(before, after) == []
    after["optim"]["lr"] = 0.5
    after["objective"]["distill"]["kd_weight"] = 1.0
    after["guard"]["max_skipped_steps"] = 3
    assert config_changes(before, after) == [
        "objective.distill.kd_weight: 0.5 -> 1.0",
        f"optim.lr: {before['optim']['lr']} -> 0.5",
        "guard.max_skipped_steps: 0 -> 3",
    ]


def test_cadence_with_another_step_size_ends_at_total_tokens():
    assert Cadence(4096, 512).last_step == 8
    assert Cadence(4096, 512, Progress(step=8, tokens_seen=2048)).last_step == 12, "8 steps of 256, then 4 of 512"
    assert Cadence(4096, 512, Progress(step=16, tokens_seen=4096)).last_step == 16


def test_step_seeds_are_fixed_and_distinct():
    seeds = {step_seed(seed, step, rank) for seed in (1, 2) for step in range(50) for rank in range(4)}
    assert len(seeds) == 2 * 50 * 4
    assert step_seed(1, 7, 0) == 13606954069298225912
    torch.manual_seed(max(seeds))
