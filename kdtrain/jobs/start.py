"""The checkpoint that a run starts from, checked against its student and its data before any weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from kdtrain.config.schema import RunConfig
from kdtrain.data.tokenizer_compare import compare_tokenizers
from kdtrain.engine import checkpoint
from kdtrain.errors import StoreMismatch
from kdtrain.jobs.build.models import student_spec
from kdtrain.jobs.export_hf import stored_prefix
from kdtrain.jobs.inputs import Inputs
from kdtrain.jobs.resume import find_resume_point
from kdtrain.jobs.sequence_prefix import Prefix, PrefixChoice
from kdtrain.models.load import model_info
from kdtrain.training.checkpoints import ResumePoint
from kdtrain.training.run_files import MODEL


def find_start(cfg: RunConfig, inputs: Inputs, run_folder: Path) -> ResumePoint | None:
    """`find_resume_point`; a new stage must keep the student and the tokenizer of the run it continues.

    Reads the file system only. Raises StoreMismatch, and CheckpointError for another model, as well.
    """
    point = find_resume_point(cfg, run_folder)
    if point is not None and point.is_stage:
        _same_tokenizer(point.path, inputs)
        config = model_info(student_spec(cfg), inputs.vocab_size).config
        checkpoint.check_config(point.path, json.loads(config.to_json_string(use_diff=False)))
    return point


def kept_prefix(point: ResumePoint | None, choice: PrefixChoice) -> Prefix | None:
    """The sequence prefix of the checkpoint that the run continues; None if it is decided anew.

    In a new stage, data and teacher may have changed, so a teacher is measured again. Without a teacher there is
    nothing to measure, and auto keeps the prefix that the student was trained with. Reads the checkpoint's state.
    """
    if point is None or (point.is_stage and (choice.configured is not None or choice.model == "teacher")):
        return None
    return stored_prefix(point.path)


def _same_tokenizer(source: Path, inputs: Inputs) -> None:
    """Raise StoreMismatch unless the stores of a new stage have the tokenizer of the run it continues."""
    kept = source.parent.parent / MODEL
    if not (kept / "tokenizer.json").is_file():
        raise StoreMismatch(
            f"{kept} has no tokenizer.json\n"
            "  why: a run keeps its student's tokenizer there, and a new stage must read tokens of the same one\n"
            "  fix: name the checkpoint inside its run folder, or put the tokenizer's files there"
        )
    found = compare_tokenizers(kept, inputs.tokenizer_dir)
    difference = found.difference
    if difference is None:
        differing = sorted({number for store in inputs.stores for number in store.occurring_ids(found.unshared)})
        if differing:
            one, other = found.unshared[differing[0]]
            difference = f"id {differing[0]}, which the data holds, is {one!r} there and {other!r} here"
    if difference is not None:
        raise StoreMismatch(
            f"{source} was trained on another tokenizer than that of {inputs.train[0].path}: {difference}\n"
            "  why: the student would be trained on ids of other tokens without any error\n"
            "  fix: prepare the stores of the new stage with the same tokenizer"
        )
