"""Checks of section student."""

from __future__ import annotations

from kdtrain.config.checks.attention import check_attention
from kdtrain.config.checks.report import Report
from kdtrain.config.schema import StudentSection


def check_student(student: StudentSection, report: Report) -> None:
    """Exactly one origin of the weights, and an attention that works in their dtype."""
    if student.weights is None and student.architecture is None:
        fix = "name an architecture to start from scratch, or a Hugging Face folder as student.weights"
        report.add("student.architecture", "and student.weights is null too: there is no student", fix)
    if student.weights is not None and student.architecture is not None:
        fix = "set one of the two to null: architecture is for a student from scratch"
        report.ignored("student.architecture", f"student.weights = {student.weights}", fix)
    check_attention("student", student, report)
