"""A run that resumes a checkpoint of an older version continues as that version did."""

import json
import shutil
from pathlib import Path

import pytest

from kdtrain.engine import checkpoint
from tests.support.launching import numbers_of, run_ranks

SAMPLES = Path(__file__).parents[1] / "support/samples"
NAMES = sorted(path.parent.name for path in SAMPLES.glob("*/expected.json"))
pytestmark = [pytest.mark.deepspeed]


@pytest.mark.parametrize("name", NAMES)
def test_run_resumes_a_checkpoint_of_an_older_version(tmp_path, name):
    sample = SAMPLES / name
    expected = json.loads((sample / "expected.json").read_text(encoding="utf-8"))
    settings = expected["settings"]
    settings["run"] |= {"output_dir": str(tmp_path), "resume": str(sample / "step_000002")}
    settings["student"]["architecture"] = str(sample / "student.json")
    # listed in the other order than then, each store with its weight
    settings["data"]["train"] = [str(sample / letter) for letter in reversed(expected["listed"])]
    settings["data"]["train_weights"] = settings["data"]["train_weights"][::-1]
    settings["checkpoint"]["export"] = False
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    done = run_ranks("train.py", tmp_path / "config.yaml")
    assert f"resumed {2:6d}  from" in done.out + done.err
    records = [record for record in numbers_of(tmp_path / "run") if "loss/ce" in record]
    assert [record["data/step"] for record in records] == [3, 4]
    if name == "first":
        assert "has no configuration to compare" in done.out + done.err
        assert "this run may repeat some text and leave some out" in done.out + done.err
    else:  # the first version blended stores in another order
        assert [record["loss/ce"] for record in records] == pytest.approx(expected["losses"][2:], abs=1e-6)
    there = checkpoint.read_state(sample / "step_000002")["loader"]["stores"]
    assert checkpoint.read_state(tmp_path / "run/checkpoints/step_000004")["loader"]["stores"] == there


@pytest.mark.parametrize("name", NAMES)
def test_damage_of_an_old_checkpoint_is_found(tmp_path, name):
    folder = shutil.copytree(SAMPLES / name / "step_000002", tmp_path / "step_000002")
    file = folder / "rank_00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match="sha256"):
        list(checkpoint.read_full_parameters(folder))
