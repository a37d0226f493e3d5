"""Roles of ranks: the first ranks of a job train the student, the last ones may hold a dedicated teacher only.

Each role has its own default process group. DeepSpeed and torch use collectives of the default group at any time
(ZeRO-3 during construction, `dist.barrier()` without a group), and ranks of the other role would not take part in them.
Meshes, engines and checkpoints of the student therefore do not include the teacher's ranks. A student's rank has the
same number in its group and in the job.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Roles:
    """How many ranks have which role. rank: this process's number in the job, as launchers and messages use it."""

    rank: int
    student_ranks: int
    teacher_ranks: int

    @classmethod
    def of(cls, rank: int, world_size: int, teacher_ranks: int) -> Roles:
        """The last teacher_ranks of world_size ranks are teachers. ConfigError if none is left for the student."""
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
        """Number of this rank within its role."""
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


def split_world(store: Store, roles: Roles, backend: str, timeout: timedelta) -> P2PChannel:
    """Create the default process group of this rank's role and the channel between roles. Every rank must call it.

    store: shared by all ranks of the job. timeout: of the role's collectives. Communicates: rendezvous of all ranks.
    """
    dist.init_process_group(
        backend,
        store=PrefixStore(f"kdtrain_{roles.name}", store),
        rank=roles.rank_in_role,
        world_size=roles.role_size,
        timeout=timeout,
    )
    return P2PChannel(store, roles.rank, roles.student_ranks + roles.teacher_ranks)
