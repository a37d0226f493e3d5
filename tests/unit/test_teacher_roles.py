"""Roles of ranks, and the check of a dedicated teacher's hidden states."""

from types import SimpleNamespace

import pytest
import torch

from kdtrain.distributed.roles import Roles
from kdtrain.distributed.vocab import HeadShard
from kdtrain.errors import ConfigError
from kdtrain.jobs.dedicated import answer_of

WIDTH = 3


def test_the_last_ranks_are_teachers():
    roles = [Roles.of(rank, 5, 2) for rank in range(5)]
    assert [r.name for r in roles] == ["student"] * 3 + ["teacher"] * 2
    assert [r.rank_in_role for r in roles] == [0, 1, 2, 0, 1]
    assert [r.role_size for r in roles] == [3, 3, 3, 2, 2]
    with pytest.raises(ConfigError, match=r"teacher.ranks = 5, but the job has 5 ranks\n"):
        Roles.of(0, 5, 5)


@pytest.mark.parametrize("odd", [{"dtype": torch.bfloat16}, {"size": (8, WIDTH + 1)}])
def test_hidden_states_that_do_not_fit_the_receive_buffer_are_refused(odd):
    hidden = torch.ones(8, WIDTH)
    backbone = SimpleNamespace(lm_head_shard=HeadShard(torch.zeros(5, WIDTH)), hidden_states=lambda batch: hidden)
    assert answer_of(backbone)(None) is hidden
    backbone.hidden_states = lambda batch: torch.zeros(**{"size": (8, WIDTH), **odd})
    with pytest.raises(ConfigError, match=r"its head is torch.float32, 3 wide(.|\n)*fix: set teacher.layout=plain"):
        answer_of(backbone)(None)
