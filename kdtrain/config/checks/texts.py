"""Checks of every setting that is a string: what can be neither a name nor a path."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from kdtrain.config.checks.report import Report


def check_texts(section: Any, report: Report, prefix: str = "") -> None:
    """Check all strings of a section and of the sections in it. prefix: the section's dotted name and a dot."""
    for field in fields(section):
        key, value = f"{prefix}{field.name}", getattr(section, field.name)
        if is_dataclass(value):
            check_texts(value, report, f"{key}.")
            continue
        for text in value if isinstance(value, list) else [value]:
            if text == "":
                report.add(key, "is empty", "give it a value, or remove the key", value="''")
            elif isinstance(text, str) and not text.isprintable():
                report.add(key, "holds a control character", "remove it", value=repr(text))
            elif isinstance(text, str) and text.startswith("~"):
                report.add(key, "begins with ~, which only a shell expands", "write the whole path", value=text)
