"""One job, two worlds: ranks that train the student, and behind them ranks that hold nothing but the teacher.

Each role has a default process group of its own. DeepSpeed and torch synchronise the default group at will (ZeRO-3
while it is built, `dist.barrier()` without a group), and a rank of another role would not answer. So the student's
world is whole in itself: a mesh over it, its engine and its checkpoints know nothing of the teacher's ranks. The first
ranks are the student's: their number in their own world is their number in the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from kdtrain.distributed.wire import Wire
from kdtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Roles:
    """Who does what. rank: this process's number in the job, the one that launchers and messages use."""

    rank: int
    student_ranks: int
    teacher_ranks: int

    @classmethod
    def of(cls, rank: int, world_size: int, teacher_ranks: int) -> Roles:
        """The last teacher_ranks of world_size ranks are teachers. ConfigError if no rank is left for the student."""
        if not 0 <= teacher_ranks < world_size:
            raise ConfigError(
                f"teacher.ranks = {teacher_ranks}, but the job has {world_size} ranks\n"
                "  why: the student needs at least one\n"
                f"  fix: start more than {teacher_ranks} ranks, or set teacher.layout=plain"
            )
        return cls(rank, world_size - teacher_ranks, teacher_ranks)

    @property
    def is_teacher(self) -> bool:
        """Whether this rank holds the teacher and no student."""
        return self.rank >= self.student_ranks

    @property
    def rank_in_role(self) -> int:
        """Number among the ranks of this role."""
        return self.rank - self.student_ranks if self.is_teacher else self.rank

    @property
    def role_size(self) -> int:
        """Ranks of this role."""
        return self.teacher_ranks if self.is_teacher else self.student_ranks

    @property
    def teachers(self) -> range:
        """The teachers' ranks."""
        return range(self.student_ranks, self.student_ranks + self.teacher_ranks)

    @property
    def name(self) -> str:
        """student or teacher."""
        return "teacher" if self.is_teacher else "student"


def split_world(store: Store, roles: Roles, backend: str, timeout: timedelta) -> Wire:
    """Make the default process group of this rank's role, and the wire to the other. Every rank of the job calls it.

    store: shared by all ranks of the job. timeout: of the role's collectives. Communicates: rendezvous of all ranks.
    """
    dist.init_process_group(
        backend,
        store=PrefixStore(f"kdtrain_{roles.name}", store),
        rank=roles.rank_in_role,
        world_size=roles.role_size,
        timeout=timeout,
    )
    return Wire(store, roles.rank, roles.student_ranks + roles.teacher_ranks)
