"""Check of the setting attention, which student and teacher have in common."""

from __future__ import annotations

from kdtrain.config.checks.report import Report
from kdtrain.config.schema import StudentSection, TeacherSection


def check_attention(role: str, model: StudentSection | TeacherSection, report: Report) -> None:
    """Whether the attention works in the model's dtype. role: the name of its section."""
    if model.attention.startswith("flash") and model.dtype == "float32":
        fix = f"set {role}.dtype=bfloat16, or {role}.attention=auto"
        report.add(f"{role}.attention", f"cannot work on {role}.dtype = float32", fix)
