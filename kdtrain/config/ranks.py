"""How a configuration divides the ranks of a job. Neither checks nor communicates."""

from __future__ import annotations

from kdtrain.config.schema import RunConfig


def teacher_ranks(cfg: RunConfig) -> int:
    """Ranks, the last ones of the job, that hold only the teacher; 0 unless teacher.layout = dedicated."""
    dedicated = cfg.teacher.weights is not None and cfg.teacher.layout == "dedicated"
    return (cfg.teacher.ranks or 0) if dedicated else 0


def student_ranks(cfg: RunConfig, world_size: int) -> int:
    """Ranks left to the student of world_size; at least 1, for checks that come after the one for that."""
    return max(1, world_size - max(0, teacher_ranks(cfg)))


def teacher_tp(cfg: RunConfig) -> int:
    """Ranks over which the teacher's matrices are cut, in any layout."""
    t = cfg.teacher
    if t.layout == "plain":
        return 1
    return t.tp or (1 if t.layout == "dedicated" else cfg.parallel.tp)


def num_teachers(cfg: RunConfig) -> int:
    """Teachers that dedicated ranks make up, of `teacher_tp` ranks each."""
    return teacher_ranks(cfg) // teacher_tp(cfg)


def data_ranks(cfg: RunConfig, world_size: int) -> int | None:
    """Ranks with different sequences, world / (tp cp); None when the ranks cannot be divided so."""
    tp, cp = cfg.parallel.tp, cfg.parallel.cp
    return None if tp < 1 or cp < 1 or world_size % (tp * cp) else world_size // (tp * cp)


def in_flight(cfg: RunConfig) -> int:
    """Micro-batches of a data rank in flight at a time; by default one computed and one queued per teacher."""
    return max(4, 2 * num_teachers(cfg)) if cfg.teacher.in_flight is None else cfg.teacher.in_flight


def servers(cfg: RunConfig, teachers: range) -> list[int]:
    """Global ranks that receive requests: the first of each tp group of `teachers`, the teachers' ranks."""
    return list(teachers[:: teacher_tp(cfg)])
