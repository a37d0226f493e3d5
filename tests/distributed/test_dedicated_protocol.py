"""Requests and answers between students and dedicated teachers, and shutdown and failure of either side."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.point_to_point import KeyValueStore, P2PChannel
from kdtrain.distributed.vocab import HeadShard
from kdtrain.documents import Documents
from kdtrain.errors import EXIT_DATA, EXIT_NON_FINITE, ConfigError, DataError, NonFiniteLoss, PeerLost, RunStopped
from kdtrain.teacher.protocol import GRACE, compare_facts, shutdown_on_exit, write_facts, write_failure
from kdtrain.teacher.remote import RemoteTeacher
from kdtrain.teacher.server import Inbox, ServerHooks, ServerSettings, TeacherServer

pytestmark = pytest.mark.dist

WIDTH, TIMEOUT = 3, timedelta(seconds=20)
CPU = torch.device("cpu")


def micro_batch(number, rows=2, columns=4):
    ids = torch.arange(rows * columns).reshape(rows, columns) + 100 * number
    positions = torch.arange(columns).expand(rows, -1).clone()
    positions[rows // 2, number % columns :] -= number % columns
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(rows))


def hidden_of(batch):
    """[T, WIDTH]: a function of token and position."""
    return (batch.input_ids + 0.25 * batch.position_ids).reshape(-1, 1) * torch.tensor([1.0, 2.0, -1.0])


def limited(most):
    """`hidden_of` with an assertion that a call gets at most `most` tokens."""

    def forward(batch):
        assert 0 < batch.num_tokens <= most
        return hidden_of(batch)

    return forward


def client(channel, rank, servers, num_clients=1, in_flight=4, **more):
    head = HeadShard(torch.zeros(5, WIDTH))
    mesh = Mesh(world_size=num_clients, rank=rank)
    return RemoteTeacher(channel, mesh, head, servers, in_flight=in_flight, timeout=TIMEOUT, **more)


def serve(channel, clients, forward=hidden_of, in_flight=4, max_tokens=None, **hooks):
    inbox = Inbox(channel, clients)

    def with_documents(batch):
        assert batch.documents.lengths == Documents.of(batch.position_ids).lengths
        return forward(batch)

    settings = ServerSettings(CPU, in_flight, max_tokens)
    server = TeacherServer(channel, Mesh(), inbox, clients, with_documents, settings, ServerHooks(**hooks))
    server.run()
    return server


def channel_of(folder, rank, world_size):
    return P2PChannel(dist.FileStore(str(folder / f"store{world_size}"), world_size), rank, world_size)


def request_many(rank, world_size, folder, in_flight):
    """Ranks 0 and 1 are clients, the rest servers; returns how many answers this server gave."""
    channel = channel_of(folder, rank, world_size)
    clients, servers = [0, 1], list(range(2, world_size))
    if rank in servers:
        served = serve(channel, clients, limited(8), in_flight=in_flight, max_tokens=9).num_answers
        channel.barrier()
        return served
    with shutdown_on_exit(channel, servers):
        teacher = client(channel, rank, servers, num_clients=2, in_flight=in_flight)
        for step in range(3):
            batches = [micro_batch(10 * step + i + 100 * rank, rows=1 + i % 3) for i in range(5)]
            teacher.prefetch(batches)
            teacher.prefetch(batches[:2])  # announced twice, requested once
            order = [3, 0, 1, 4, 2] if step == 1 else range(5)  # not the order of the requests
            for i in order:
                signal = teacher.signal(batches[i])
                assert torch.equal(signal.hidden_states, hidden_of(batches[i]))
                assert signal._resharding is None
        late = micro_batch(7)
        assert torch.equal(teacher.signal(late).hidden_states, hidden_of(late)), "not announced"
    channel.barrier()
    return None


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("world_size", [3, 4])
def test_each_micro_batch_gets_its_answer_and_servers_share_the_work(world_size, in_flight, rank_pool, tmp_path):
    answers = rank_pool(world_size).run(request_many, folder=tmp_path, in_flight=in_flight)
    assert sum(answers[2:]) == 2 * (3 * 5 + 1), "each micro-batch is requested once"
    assert max(answers[2:]) - min(answers[2:]) <= 2


def requests_from_a_device(rank, world_size, folder):
    """The client's device is `meta`, whose tensors cannot be read, so it must send the host's copies."""
    channel = channel_of(folder, rank, world_size)
    if rank == 1:
        seen = []
        serve(channel, [0], lambda batch: seen.append(batch.input_ids) or hidden_of(batch), in_flight=2)
        return seen
    batches = [micro_batch(i) for i in range(4)]
    step, late = [batch.to("meta") for batch in batches[:3]], batches[3].to("meta")
    with shutdown_on_exit(channel, [1]):
        head = HeadShard(torch.zeros(5, WIDTH, device="meta"))
        teacher = RemoteTeacher(channel, Mesh(), head, [1], in_flight=2, timeout=TIMEOUT)
        teacher.prefetch(step)
        for batch in [*step, late]:  # the last is not announced, as in an evaluation
            assert teacher.signal(batch).hidden_states.shape == (batch.num_tokens, WIDTH)
        with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
            teacher.signal(Batch(*late.tensors()))
    return [batch.input_ids for batch in batches]


def test_a_client_does_not_read_from_its_device(rank_pool, tmp_path):
    sent, seen = rank_pool(2).run(requests_from_a_device, folder=tmp_path)
    assert len(seen) == 4
    assert all(torch.equal(*pair) for pair in zip(sent, seen, strict=True))


def works_ahead(rank, world_size, folder):
    """The client takes its first answer after the server has computed as many as may be in flight."""
    channel = channel_of(folder, rank, world_size)
    if rank == 1:
        calls = []

        def forward(batch):
            calls.append(1)
            if len(calls) == 3:
                channel.key_values.write("three", {})
            return hidden_of(batch)

        serve(channel, [0], forward, in_flight=3)
        return len(calls)
    with shutdown_on_exit(channel, [1]):
        teacher = client(channel, rank, [1], in_flight=3)
        batches = [micro_batch(i) for i in range(6)]
        teacher.prefetch(batches)
        channel.key_values.read("three", TIMEOUT)  # three are computed, none is taken
        for batch in batches:
            assert torch.equal(teacher.signal(batch).hidden_states, hidden_of(batch))
    return 6


def test_the_teacher_computes_ahead_of_the_client(rank_pool, tmp_path):
    assert rank_pool(2).run(works_ahead, folder=tmp_path) == [6, 6]


def failing_teacher(rank, world_size, folder, error):
    channel = channel_of(folder, rank, world_size)
    if rank == 2:
        calls = []

        def forward(batch):
            calls.append(1)
            if len(calls) == 4:
                raise error
            return hidden_of(batch)

        with pytest.raises(type(error), match="the fourth is bad"):
            serve(channel, [0, 1], forward)
        return None
    with pytest.raises(PeerLost) as caught, shutdown_on_exit(channel, [2]):
        teacher = client(channel, rank, [2], num_clients=2)
        for i in range(4):
            teacher.signal(micro_batch(i))
    return str(caught.value), caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (DataError("the fourth is bad\n  fix: mend it"), "the fourth is bad\n  fix: mend it", EXIT_DATA),
        (RuntimeError("the fourth is bad"), "RuntimeError: the fourth is bad", 1),
    ],
)
def test_a_failing_teacher_ends_every_client_with_its_message_and_exit_code(error, text, code, rank_pool, tmp_path):
    first, second, _ = rank_pool(3).run(failing_teacher, folder=tmp_path, error=error)
    assert first == second == (f"the teacher on rank 2 ended: {text}", code)


def failing_before_a_late_batch(rank, world_size, folder):
    """The teacher fails at an announced batch while the client waits for one that it requested later."""
    channel = channel_of(folder, rank, world_size)
    if rank == 1:

        def forward(batch):
            channel.key_values.read("waiting", TIMEOUT)
            raise DataError("the first is bad")

        with pytest.raises(DataError, match="the first is bad"):
            serve(channel, [0], forward, in_flight=2)
        channel.key_values.read("received", TIMEOUT)  # keep the connection open until then
        return None
    with pytest.raises(PeerLost) as caught, shutdown_on_exit(channel, [1]):
        teacher = client(channel, rank, [1], in_flight=2)
        teacher.prefetch([micro_batch(i) for i in range(3)])
        channel.key_values.write("waiting", {})
        started = time.monotonic()
        teacher.signal(micro_batch(9))  # not announced, as in an evaluation between two steps
    seconds = time.monotonic() - started
    channel.key_values.write("received", {})
    return str(caught.value), caught.value.exit_code, seconds


def test_a_failing_teacher_ends_a_client_that_waits_for_a_later_answer(rank_pool, tmp_path):
    text, code, seconds = rank_pool(2).run(failing_before_a_late_batch, folder=tmp_path)[0]
    assert (text, code) == ("the teacher on rank 1 ended: the first is bad", EXIT_DATA)
    assert seconds < 0.5 * GRACE.total_seconds()


def failing_student(rank, world_size, folder):
    channel = channel_of(folder, rank, world_size)
    if rank == 2:
        with pytest.raises(PeerLost) as caught:
            serve(channel, [0, 1])
        return str(caught.value), caught.value.exit_code
    teacher = client(channel, rank, [2], num_clients=2)
    if rank == 0:
        with pytest.raises(PeerLost) as caught, shutdown_on_exit(channel, [2]):
            channel.key_values.read("failed", TIMEOUT)
            for i in range(100):  # some may be answered before the failure of rank 1 arrives
                teacher.signal(micro_batch(i))
        return str(caught.value), caught.value.exit_code
    with pytest.raises(NonFiniteLoss), shutdown_on_exit(channel, [2]):
        teacher.signal(micro_batch(0))
        raise NonFiniteLoss("inf")
    channel.key_values.write("failed", {})
    return None


def test_a_failing_client_ends_the_teacher_with_its_exit_code(rank_pool, tmp_path):
    other, _, (text, code) = rank_pool(3).run(failing_student, folder=tmp_path)
    assert text == "rank 1 (student) failed; see its error message"
    assert code == EXIT_NON_FINITE
    assert other == (f"the teacher on rank 2 ended: {text}", EXIT_NON_FINITE)


def stopping(rank, world_size, folder):
    channel = channel_of(folder, rank, world_size)
    if rank == 1:
        answered = []

        def forward(batch):
            answered.append(1)
            return hidden_of(batch)

        with pytest.raises(RunStopped):
            serve(channel, [0], forward, stop_requested=lambda: len(answered) > 1)
        return None
    stops = []
    with pytest.raises(RunStopped), shutdown_on_exit(channel, [1]):
        teacher = client(channel, rank, [1], on_stop=lambda: stops.append(1))
        for i in range(2):
            teacher.signal(micro_batch(i))
            assert len(stops) == i
        raise RunStopped("by signal")
    return True


def test_a_stop_signal_at_the_teacher_stops_clients_and_teacher(rank_pool, tmp_path):
    assert rank_pool(2).run(stopping, folder=tmp_path)[0]


def stopping_by_the_second_rank(rank, world_size, folder):
    """Ranks 1 and 2 are one teacher; only the second gets the stop signal."""
    channel = channel_of(folder, rank, world_size)
    group = dist.new_group([1, 2])
    if rank > 0:
        mesh = Mesh(world_size=2, rank=rank - 1, tp_size=2, tp_group=group)
        server = TeacherServer(
            channel,
            mesh,
            Inbox(channel, [0]) if rank == 1 else None,
            [0],
            hidden_of,
            ServerSettings(CPU, 4),
            ServerHooks(stop_requested=lambda: rank == 2 and server.num_answers > 1),
        )
        with pytest.raises(RunStopped):
            server.run()
        return None
    stops = []
    with pytest.raises(RunStopped), shutdown_on_exit(channel, [1]):
        teacher = client(channel, rank, [1], on_stop=lambda: stops.append(1))
        for i in range(2):
            assert torch.equal(teacher.signal(micro_batch(i)).hidden_states, hidden_of(micro_batch(i)))
            assert len(stops) == i
        raise RunStopped("by signal")
    return True


def test_a_stop_signal_at_any_rank_of_a_teacher_stops_the_clients(rank_pool, tmp_path):
    assert rank_pool(3).run(stopping_by_the_second_rank, folder=tmp_path)[0]


def idle_beyond_the_timeout_of_collectives(rank, world_size, folder):
    """Ranks 1 and 2 are one teacher; the client pauses, as it does while it saves or exports."""
    limit = timedelta(seconds=2)
    channel = channel_of(folder, rank, world_size)
    group = dist.new_group([1, 2], timeout=limit)
    if rank > 0:
        mesh = Mesh(world_size=2, rank=rank - 1, tp_size=2, tp_group=group)
        inbox = Inbox(channel, [0]) if rank == 1 else None
        TeacherServer(channel, mesh, inbox, [0], hidden_of, ServerSettings(CPU, 4)).run()
        return None
    with shutdown_on_exit(channel, [1]):
        teacher = client(channel, rank, [1])
        for i in range(2):
            time.sleep(1.5 * i * limit.total_seconds())
            assert torch.equal(teacher.signal(micro_batch(i)).hidden_states, hidden_of(micro_batch(i)))
    return True


def test_an_idle_teacher_of_several_ranks_does_not_time_out(rank_pool, tmp_path):
    assert rank_pool(3).run(idle_beyond_the_timeout_of_collectives, folder=tmp_path)[0]


def facts_that_differ(rank, world_size, folder):
    channel = channel_of(folder, rank, world_size)
    if rank == 1:
        write_facts(channel.key_values, rank, {"width": 8, "vocabulary": 299})
        channel.barrier()
        write_failure(channel.key_values, rank, DataError("the weights are damaged"))
        channel.barrier()
        return None
    with pytest.raises(ConfigError, match=r"teacher on rank 1 .*\n  width: 8 there, 9 here\n  why"):
        compare_facts(channel.key_values, [1], {"width": 9, "vocabulary": 299}, TIMEOUT)
    facts = compare_facts(channel.key_values, [1], {"width": 8}, TIMEOUT)
    assert facts == [{"width": 8, "vocabulary": 299}], "facts that are not compared are returned too"
    channel.barrier()
    channel.barrier()
    with pytest.raises(PeerLost, match="teacher on rank 1 ended: the weights are damaged") as caught:
        compare_facts(channel.key_values, [1], {"width": 8}, TIMEOUT)
    assert caught.value.exit_code == EXIT_DATA
    with pytest.raises(PeerLost, match=r"'facts/7' was not written within 1 s\n"):
        compare_facts(channel.key_values, [7], {}, timedelta(seconds=1))
    return True


def test_loaded_facts_are_compared_and_a_teacher_that_cannot_load_ends_the_wait(rank_pool, tmp_path):
    assert rank_pool(2).run(facts_that_differ, folder=tmp_path)[0]


def test_reading_ends_at_once_with_the_host_of_the_key_value_store():
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store = KeyValueStore(dist.TCPStore("127.0.0.1", host.port, None, False))
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(store.read, "facts/1", TIMEOUT)
        time.sleep(0.5)
        del host  # the last reference: the server ends
        with pytest.raises(PeerLost, match=r"rank 0, which hosts the key-value store of the job, has ended\n  why"):
            answer.result()
    assert time.monotonic() - started < 0.5 * TIMEOUT.total_seconds()


def silent_teacher(rank, world_size, folder, stays):
    channel = channel_of(folder, rank, world_size)
    if rank == 1:
        if stays:
            channel.key_values.read("over", TIMEOUT)
        return None  # closes its connection
    teacher = client(channel, rank, [1])
    teacher._timeout = timedelta(seconds=1) if stays else TIMEOUT
    started = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        teacher.signal(micro_batch(0))
    channel.key_values.write("over", {})
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize(("stays", "why"), [(True, "Timed out waiting 1000ms"), (False, "")])
def test_a_lost_or_silent_teacher_ends_the_wait(stays, why, fresh_pool, tmp_path):
    text, seconds = fresh_pool(2).run(silent_teacher, folder=tmp_path, stays=stays)[0]
    assert text.startswith(f"rank 1 has ended or does not respond: {why}")
    assert text.endswith("\n  why: students and teachers of a run end together\n  fix: see the last messages of rank 1")
    assert seconds < 0.5 * TIMEOUT.total_seconds()
