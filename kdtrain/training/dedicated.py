"""Runs whose teacher lives on ranks of its own: what those ranks do, and what the student's ranks hold instead."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdtrain.batch import Batch
from kdtrain.config.load import config_hash
from kdtrain.config.ranks import in_flight, servers, student_ranks, teacher_tp
from kdtrain.config.schema import RunConfig
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.distributed.wire import Wire
from kdtrain.engine.bootstrap import Runtime, collective_timeout
from kdtrain.errors import ConfigError, KdtrainError
from kdtrain.log import LOGGER, setup_logging
from kdtrain.models.backbone import Backbone
from kdtrain.models.head import LoadedHead, load_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog
from kdtrain.teacher.protocol import compare_facts, farewell, write_facts, write_failure
from kdtrain.teacher.remote import RemoteTeacher
from kdtrain.teacher.server import Inbox, TeacherServer


def serve(
    cfg: RunConfig,
    spec: ModelSpec,
    vocab_size: int,
    runtime: Runtime,
    *,
    folder: Path | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> None:
    """The whole life of a teacher's rank: load, tell what was loaded, answer until the student's ranks have ended.

    folder: of the run, where heartbeats and warnings are written; None: nowhere. Every teacher rank must call it.
    Raises RunStopped and PeerLost as `TeacherServer.run`, and what loading raises; the student's ranks are told.
    """
    wire, roles = runtime.wire, runtime.roles
    assert wire is not None
    clients = list(range(0, roles.student_ranks, cfg.parallel.tp))
    mesh = Mesh.build(teacher_tp(cfg))
    inbox = Inbox(wire, clients) if mesh.tp_rank == 0 else None
    try:
        backbone = load_backbone(
            spec, mesh, vocab_size=vocab_size, device=runtime.device, trainable=False, packed=cfg.data.reset_positions
        ).eval()
        first = _first_row(backbone.lm_head_shard)
        facts = expected_facts(cfg, spec, vocab_size, backbone.config)
        write_facts(wire.board, roles.rank, {**facts, FIRST_ROW: first, ATTENTION: backbone.implementation})
    except BaseException as error:
        _cannot_load(error, runtime, inbox, clients)
        raise
    pulse, stack = PhaseTracker(roles.rank), ExitStack()

    def begun() -> None:  # not before: the folder is rank 0's to make
        if folder is not None:
            setup_logging(roles.rank, folder)
            # Only says where this rank is: waiting long for a request is nothing to warn of.
            stack.enter_context(Watchdog(pulse, folder, wire.world_size, warn_s=math.inf))

    with stack:
        TeacherServer(
            wire,
            mesh,
            inbox,
            clients,
            answer_of(backbone),
            device=runtime.device,
            in_flight=in_flight(cfg),
            max_tokens=cfg.teacher.max_tokens_per_forward,
            begun=begun,
            wants_stop=wants_stop,
            pulse=pulse,
        ).run()


def answer_of(backbone: Backbone) -> Callable[[Batch], Tensor]:
    """Its hidden states, in the dtype and width of its head's rows: for these the student's ranks make room.

    The answer raises ConfigError for a model whose hidden states are otherwise.
    """
    weight = backbone.lm_head_shard.weight

    def hidden_states(batch: Batch) -> Tensor:
        hidden = backbone.hidden_states(batch)
        if (hidden.dtype, hidden.shape[-1]) != (weight.dtype, weight.shape[-1]):
            raise ConfigError(
                f"the teacher's hidden states are {hidden.dtype}, {hidden.shape[-1]} wide; its head is {weight.dtype}, "
                f"{weight.shape[-1]} wide\n  why: the student's ranks make room for what the head multiplies with\n"
                "  fix: set teacher.layout=plain or tp, where hidden states need no room made in advance"
            )
        return hidden

    return hidden_states


def _cannot_load(error: BaseException, runtime: Runtime, inbox: Inbox | None, clients: list[int]) -> None:
    """Tell the student's ranks, and give them time to end by themselves.

    Said here, too: the launcher ends ranks that are still busy loading before they can learn of it and say it.
    """
    assert runtime.wire is not None
    rank = runtime.roles.rank
    write_failure(runtime.wire.board, rank, error)
    if isinstance(error, KdtrainError):
        print(f"kdtrain: the teacher on rank {rank} cannot be loaded: {error}", file=sys.stderr, flush=True)
    if inbox is not None:
        inbox.hear_goodbyes(set(clients))


@contextmanager
def student_side(cfg: RunConfig, runtime: Runtime) -> Iterator[None]:
    """Around all that a student's rank does: however it ends, dedicated teachers are told and end too."""
    wire, roles = runtime.wire, runtime.roles
    if wire is None or roles.rank % cfg.parallel.tp:
        yield
        return
    with farewell(wire, servers(cfg, roles.teachers)):
        yield


def remote_teacher(
    cfg: RunConfig,
    spec: ModelSpec,
    shard: VocabShard,
    mesh: Mesh,
    device: torch.device,
    wire: Wire,
    on_stop: Callable[[], None],
) -> tuple[RemoteTeacher, LoadedHead, str]:
    """The teacher as a student's rank holds it: whom to ask for hidden states, its rows of the head, and the name of
    what computes attention on the first teacher's ranks.

    shard: the student's. Every rank of the student must call it. Waits until all teachers are loaded, and holds what
    they loaded against this rank's files: ConfigError naming both values, PeerLost if a teacher failed.
    """
    loaded = load_head(spec, shard, device=device)
    facts = expected_facts(cfg, spec, shard.vocab_size, loaded.facts.config)
    if mesh.tp_rank == 0:
        facts[FIRST_ROW] = _first_row(loaded.head)
    asked = servers(cfg, range(student_ranks(cfg, wire.world_size), wire.world_size))
    told = compare_facts(wire.board, asked, facts, collective_timeout())
    LOGGER.info("teacher  %d on ranks %s, ready", len(asked), asked)
    remote = RemoteTeacher(
        wire, mesh, loaded.head, asked, in_flight=in_flight(cfg), timeout=collective_timeout(), on_stop=on_stop
    )
    return remote, loaded, str(told[0][ATTENTION])


FIRST_ROW = "first row of the teacher's head (sha256)"
ATTENTION = "attention"


def expected_facts(cfg: RunConfig, spec: ModelSpec, vocab_size: int, model_config: Any) -> dict[str, Any]:
    """What both roles must agree on, in words that a message can use."""
    assert spec.weights is not None
    return {
        "configuration": config_hash(cfg),
        "teacher.weights, config.json (sha256)": _digest((Path(spec.weights) / "config.json").read_bytes()),
        "teacher.dtype": spec.dtype,
        "width": int(model_config.hidden_size),
        "vocabulary": vocab_size,
    }


def _first_row(head: HeadShard) -> str:
    """Of a first tp rank, whose rows begin with token 0: the same bytes in any cut."""
    row: Tensor = head.weight[0].detach().cpu().contiguous()
    return _digest(row.view(torch.uint8).numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
