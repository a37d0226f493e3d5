"""The runs of benchmarks/gpu_train.py: models, settings, references and tolerances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 6
FLOAT32, BFLOAT16 = 1e-4, 5e-2
HALF = ("student.dtype=bfloat16", "teacher.dtype=bfloat16")
HEADS = {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1], "long_factor": [2.0, 5.0]}
RECURRENT = {
    "model_type": "olmo_hybrid",
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
"""OLMo-Hybrid creates `A_log` of its recurrent layers in float32, in bfloat16 models too."""


@dataclass(frozen=True, slots=True)
class Run:
    """models: a key of MODELS; reference: of REFERENCES, of the same models. resumed: in two launches."""

    name: str
    settings: tuple[str, ...]
    tolerance: float = FLOAT32
    models: str = "llama"
    reference: str = "llama"
    resumed: bool = False

    def stops(self) -> list[list[str]]:
        """Settings of each launch that set where it stops; the last one runs to the end."""
        from tests.support.tiny_run import TOKENS_PER_STEP

        return [[f"train.total_tokens={STEPS // 2 * TOKENS_PER_STEP}"], []] if self.resumed else [[]]


RUNS = (
    Run("zero0", ("zero.stage=0", "train.kernels=auto")),
    Run("zero1", ("zero.stage=1",)),
    Run("zero2_overlap_async", ("zero.stage=2", "teacher.overlap=true", "checkpoint.async_write=true")),
    Run(
        "zero3_teacher3_offload",
        ("zero.stage=3", "teacher.zero_stage=3", "teacher.offload=true", "student.activation_checkpointing=true"),
    ),
    Run("offload2", ("zero.stage=2", "zero.offload_optimizer=true")),
    Run("offload3", ("zero.stage=3", "zero.offload_optimizer=true")),
    Run("bfloat16_1", ("zero.stage=1", "teacher.overlap=true", *HALF), BFLOAT16),
    Run("bfloat16_2", ("zero.stage=2", "teacher.overlap=true", *HALF), BFLOAT16),
    Run("bfloat16_3", ("zero.stage=3", *HALF), BFLOAT16),
    Run("resumed", ("zero.stage=2", "checkpoint.async_write=true"), resumed=True),
    Run("longrope", ("zero.stage=2", "teacher.overlap=true"), models="longrope", reference="longrope"),
    Run(
        "teacher3_two_dtypes",
        ("zero.stage=3", "teacher.zero_stage=3", *HALF),
        BFLOAT16,
        models="recurrent_teacher",
        reference="recurrent_teacher",
    ),
    Run(
        "student_two_dtypes_overlap",
        ("zero.stage=2", "teacher.overlap=true", *HALF),
        BFLOAT16,
        models="recurrent_student",
        reference="recurrent_student",
    ),
)

REFERENCES = {
    "llama": Run("llama", ("zero.stage=1",)),
    "longrope": Run("longrope", ("zero.stage=1",), models="longrope"),
    "recurrent_teacher": Run("recurrent_teacher", ("zero.stage=1", *HALF), models="recurrent_teacher"),
    "recurrent_student": Run("recurrent_student", ("zero.stage=1", *HALF), models="recurrent_student"),
}
"""Models -> the run on the CPU; of models with tensors of two dtypes in bfloat16 too."""


def model_configs(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(the student's config, the teacher's, settings of the section data)"""
    from kdtrain.models.tiny import tiny_config

    llama, qwen = tiny_config("llama", **HEADS), tiny_config("qwen3", **HEADS)
    if name == "longrope":  # tables change at 8 of 16 tokens
        long = tiny_config("phi3", original_max_position_embeddings=8, rope_parameters=LONG)
        return long, {**long, "num_hidden_layers": 3}, {}
    recurrent, whole = tiny_config("olmo2", **RECURRENT), {"reset_positions": False}  # recurrent layers cannot pack
    return {
        "llama": (llama, qwen, {}),
        "recurrent_teacher": (llama, recurrent, whole),
        "recurrent_student": (recurrent, qwen, whole),
    }[name]


def write_models(folder: Path, names: Iterable[str]) -> None:
    """folder/NAME: configuration, data, tokenizer and teacher of each of these models."""
    from tests.support.tiny_run import write_run

    for name in sorted(names):
        student, teacher, data = model_configs(name)
        (folder / name).mkdir(parents=True)
        write_run(folder / name, student=student, teacher=teacher, steps=STEPS, data=data)
        if teacher["model_type"] == RECURRENT["model_type"]:
            save_as_modules(folder / name / "teacher")


def save_as_modules(folder: Path) -> None:
    """Weights under the names that the model's modules have; kdtrain does not read the form this class is saved in."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, save_original_format=False)
