"""A teacher on dedicated ranks: the job of those ranks, and the teacher that the student's ranks hold instead."""

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
from kdtrain.distributed.point_to_point import P2PChannel
from kdtrain.distributed.vocab import HeadShard, VocabShard
from kdtrain.engine.bootstrap import Runtime, collective_timeout
from kdtrain.errors import ConfigError, KdtrainError
from kdtrain.log import LOGGER, setup_logging
from kdtrain.models.backbone import Backbone
from kdtrain.models.head import LoadedHead, load_head
from kdtrain.models.load import ModelSpec, load_backbone
from kdtrain.run_state.heartbeat import PhaseTracker, Watchdog
from kdtrain.teacher.protocol import compare_facts, shutdown_on_exit, write_facts, write_failure
from kdtrain.teacher.remote import RemoteTeacher
from kdtrain.teacher.server import Inbox, ServerHooks, ServerSettings, TeacherServer


def serve(
    cfg: RunConfig,
    spec: ModelSpec | None,
    vocab_size: int,
    runtime: Runtime,
    *,
    folder: Path | None = None,
    wants_stop: Callable[[], bool] = lambda: False,
) -> None:
    """The job of a teacher's rank: load, publish facts of the model, serve requests until the student's ranks end.

    spec: of the teacher. folder: of the run, for heartbeats and warnings; None: write none. Every rank of the teacher
    must call it. Communicates point to point with the student's ranks, over tp among the teacher's own.
    Raises RunStopped and PeerLost as `TeacherServer.run`, and any error of loading, which it sends to the student's
    ranks.
    """
    channel, roles = runtime.channel, runtime.roles
    assert channel is not None
    assert spec is not None  # a job without teacher.weights has no teacher ranks
    clients = list(range(0, roles.student_ranks, cfg.parallel.tp))
    mesh = Mesh.build(teacher_tp(cfg))
    inbox = Inbox(channel, clients) if mesh.tp_rank == 0 else None
    try:
        backbone = _load_and_publish(cfg, spec, vocab_size, runtime, mesh)
    except BaseException as error:
        _cannot_load(error, runtime, inbox, clients)
        raise
    tracker, stack = PhaseTracker(roles.rank), ExitStack()

    def begun() -> None:  # called at the first request: by then rank 0 has created the folder
        if folder is not None:
            setup_logging(roles.rank, folder)
            # writes heartbeats only: a long wait for a request is normal
            stack.enter_context(Watchdog(tracker, folder, channel.world_size, warn_s=math.inf))

    with stack:
        TeacherServer(
            channel,
            mesh,
            inbox,
            clients,
            answer_of(backbone),
            ServerSettings(runtime.device, in_flight(cfg), cfg.teacher.max_tokens_per_forward),
            ServerHooks(begun, wants_stop, tracker),
        ).run()


def _load_and_publish(cfg: RunConfig, spec: ModelSpec, vocab_size: int, runtime: Runtime, mesh: Mesh) -> Backbone:
    """This rank's part of the teacher, whose facts all ranks of the job can read then. Communicates over tp."""
    assert runtime.channel is not None
    backbone = load_backbone(
        spec, mesh, vocab_size=vocab_size, device=runtime.device, trainable=False, packed=cfg.data.reset_positions
    ).eval()
    first = _first_row(backbone.lm_head_shard)
    facts = expected_facts(cfg, spec, vocab_size, backbone.config)
    found = {**facts, FIRST_ROW: first, ATTENTION: backbone.implementation}
    write_facts(runtime.channel.key_values, runtime.roles.rank, found)
    return backbone


def answer_of(backbone: Backbone) -> Callable[[Batch], Tensor]:
    """A function from batches to the hidden states [B, S, D] of `backbone`.

    It raises ConfigError unless they have the dtype and width of the head's rows, for which the student's ranks
    allocate their buffers.
    """
    weight = backbone.lm_head_shard.weight

    def hidden_states(batch: Batch) -> Tensor:
        hidden = backbone.hidden_states(batch)
        if (hidden.dtype, hidden.shape[-1]) != (weight.dtype, weight.shape[-1]):
            raise ConfigError(
                f"the teacher's hidden states are {hidden.dtype}, {hidden.shape[-1]} wide; its head is {weight.dtype}, "
                f"{weight.shape[-1]} wide\n  why: the student's ranks allocate buffers of the head's dtype and width\n"
                "  fix: set teacher.layout=plain or tp, which need no such buffers"
            )
        return hidden

    return hidden_states


def _cannot_load(error: BaseException, runtime: Runtime, inbox: Inbox | None, clients: list[int]) -> None:
    """Send the error to the student's ranks and wait until they have shut down.

    Also print it here: the launcher kills ranks that are still loading, which then never receive it.
    """
    assert runtime.channel is not None
    rank = runtime.roles.rank
    write_failure(runtime.channel.key_values, rank, error)
    if isinstance(error, KdtrainError):
        print(f"kdtrain: the teacher on rank {rank} cannot be loaded: {error}", file=sys.stderr, flush=True)
    if inbox is not None:
        inbox.drain(set(clients))


@contextmanager
def student_side(cfg: RunConfig, runtime: Runtime) -> Iterator[None]:
    """Context of a student's rank; at its end, normal or not, it sends the dedicated teachers a shutdown message."""
    channel, roles = runtime.channel, runtime.roles
    if channel is None or roles.rank % cfg.parallel.tp:
        yield
        return
    with shutdown_on_exit(channel, servers(cfg, roles.teachers)):
        yield


def remote_teacher(
    cfg: RunConfig,
    spec: ModelSpec,
    shard: VocabShard,
    mesh: Mesh,
    device: torch.device,
    channel: P2PChannel,
    on_stop: Callable[[], None],
) -> tuple[RemoteTeacher, LoadedHead, str]:
    """The dedicated teacher as a student's rank holds it: a `RemoteTeacher`, its rows of the head, and the attention
    implementation on the teacher's ranks.

    shard: the student's. Every rank of the student must call it. Waits until all teachers are loaded and compares the
    facts that they published with this rank's files. Raises ConfigError naming both values, PeerLost if a teacher
    failed.
    """
    loaded = load_head(spec, shard, device=device)
    facts = expected_facts(cfg, spec, shard.vocab_size, loaded.info.config)
    if mesh.tp_rank == 0:
        facts[FIRST_ROW] = _first_row(loaded.head)
    teachers = servers(cfg, range(student_ranks(cfg, channel.world_size), channel.world_size))
    found = compare_facts(channel.key_values, teachers, facts, collective_timeout())
    LOGGER.info("teacher  %d on ranks %s, ready", len(teachers), teachers)
    remote = RemoteTeacher(
        channel, mesh, loaded.head, teachers, in_flight=in_flight(cfg), timeout=collective_timeout(), on_stop=on_stop
    )
    return remote, loaded, str(found[0][ATTENTION])


FIRST_ROW = "first row of the teacher's head (sha256)"
ATTENTION = "attention"


def expected_facts(cfg: RunConfig, spec: ModelSpec, vocab_size: int, model_config: Any) -> dict[str, Any]:
    """Facts that must be equal on both roles, by a name for messages."""
    assert spec.weights is not None
    return {
        "configuration": config_hash(cfg),
        "teacher.weights, config.json (sha256)": _digest((Path(spec.weights) / "config.json").read_bytes()),
        "teacher.dtype": spec.dtype,
        "width": int(model_config.hidden_size),
        "vocabulary": vocab_size,
    }


def _first_row(head: HeadShard) -> str:
    """Digest of token 0's row of the head, on a first tp rank: the same in any tensor-parallel layout."""
    row: Tensor = head.weight[0].detach().cpu().contiguous()
    return _digest(row.view(torch.uint8).numpy().tobytes())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
