"""What passes between the student's ranks and dedicated teachers: who answers what, how each side learns of an end."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from kdtrain.batch import Batch
from kdtrain.distributed.mesh import Mesh
from kdtrain.distributed.roles import Roles
from kdtrain.distributed.vocab import HeadShard
from kdtrain.distributed.wire import Board, Wire
from kdtrain.documents import Documents
from kdtrain.errors import EXIT_DATA, EXIT_NON_FINITE, ConfigError, DataError, NonFiniteLoss, PeerLost, RunStopped
from kdtrain.jobs.dedicated import answer_of
from kdtrain.teacher.protocol import GRACE, compare_facts, farewell, write_facts, write_failure
from kdtrain.teacher.remote import RemoteTeacher
from kdtrain.teacher.server import Inbox, TeacherServer

pytestmark = pytest.mark.dist

WIDTH, TIMEOUT = 3, timedelta(seconds=20)


def micro_batch(number, rows=2, columns=4):
    ids = torch.arange(rows * columns).reshape(rows, columns) + 100 * number
    positions = torch.arange(columns).expand(rows, -1).clone()
    positions[rows // 2, number % columns :] -= number % columns
    return Batch(ids, ids, torch.ones(ids.shape), positions, torch.arange(rows))


def hidden_of(batch):
    """[T, WIDTH]: of both what the model reads of a batch, and of each token by itself."""
    return (batch.input_ids + 0.25 * batch.position_ids).reshape(-1, 1) * torch.tensor([1.0, 2.0, -1.0])


def limited(most):
    """`hidden_of`, refusing more than `most` tokens at a time."""

    def forward(batch):
        assert 0 < batch.num_tokens <= most
        return hidden_of(batch)

    return forward


def client(wire, rank, servers, num_clients=1, in_flight=4, **more):
    head = HeadShard(torch.zeros(5, WIDTH))
    mesh = Mesh(world_size=num_clients, rank=rank)
    return RemoteTeacher(wire, mesh, head, servers, in_flight=in_flight, timeout=TIMEOUT, **more)


def serve(wire, clients, forward=hidden_of, in_flight=4, **more):
    inbox = Inbox(wire, clients)

    def with_documents(batch):
        assert batch.documents.lengths == Documents.of(batch.position_ids).lengths
        return forward(batch)

    server = TeacherServer(
        wire, Mesh(), inbox, clients, with_documents, device=torch.device("cpu"), in_flight=in_flight, **more
    )
    server.run()
    return server


def wire_of(folder, rank, world_size):
    return Wire(dist.FileStore(str(folder / f"store{world_size}"), world_size), rank, world_size)


def ask_many(rank, world_size, folder, in_flight):
    """Ranks 0 and 1 ask, the rest answer; how many answers this rank gave."""
    wire = wire_of(folder, rank, world_size)
    clients, servers = [0, 1], list(range(2, world_size))
    if rank in servers:
        served = serve(wire, clients, limited(8), in_flight=in_flight, max_tokens=9).num_answers
        wire.barrier()
        return served
    with farewell(wire, servers):
        teacher = client(wire, rank, servers, num_clients=2, in_flight=in_flight)
        for step in range(3):
            batches = [micro_batch(10 * step + i + 100 * rank, rows=1 + i % 3) for i in range(5)]
            teacher.begin_step(batches)
            teacher.begin_step(batches[:2])  # told twice, asked once
            order = [3, 0, 1, 4, 2] if step == 1 else range(5)  # not the order of asking
            for i in order:
                signal = teacher.signal(batches[i])
                assert torch.equal(signal.hidden_states, hidden_of(batches[i]))
                assert signal.spread is None
        late = micro_batch(7)
        assert torch.equal(teacher.signal(late).hidden_states, hidden_of(late)), "nobody was told of this one"
    wire.barrier()
    return None


@pytest.mark.parametrize("in_flight", [1, 4])
@pytest.mark.parametrize("world_size", [3, 4])
def test_every_micro_batch_gets_its_own_answer_and_teachers_share_the_work(world_size, in_flight, rank_pool, tmp_path):
    answers = rank_pool(world_size).run(ask_many, folder=tmp_path, in_flight=in_flight)
    assert sum(answers[2:]) == 2 * (3 * 5 + 1), "each micro-batch is asked for once"
    assert max(answers[2:]) - min(answers[2:]) <= 2


def asked_from_a_device(rank, world_size, folder):
    """The client's device is `meta`, whose tensors cannot be read: what it sends is what the host has."""
    wire = wire_of(folder, rank, world_size)
    if rank == 1:
        seen = []
        serve(wire, [0], lambda batch: seen.append(batch.input_ids) or hidden_of(batch), in_flight=2)
        return seen
    batches = [micro_batch(i) for i in range(4)]
    step, late = [batch.to("meta") for batch in batches[:3]], batches[3].to("meta")
    with farewell(wire, [1]):
        head = HeadShard(torch.zeros(5, WIDTH, device="meta"))
        teacher = RemoteTeacher(wire, Mesh(), head, [1], in_flight=2, timeout=TIMEOUT)
        teacher.begin_step(step)
        for batch in [*step, late]:  # the last as an evaluation asks
            assert teacher.signal(batch).hidden_states.shape == (batch.num_tokens, WIDTH)
        with pytest.raises(RuntimeError, match="Cannot copy out of meta tensor"):
            teacher.signal(Batch(*late.tensors()))
    return [batch.input_ids for batch in batches]


def test_a_client_reads_nothing_from_its_device(rank_pool, tmp_path):
    asked, seen = rank_pool(2).run(asked_from_a_device, folder=tmp_path)
    assert len(seen) == 4
    assert all(torch.equal(*pair) for pair in zip(asked, seen, strict=True))


def works_ahead(rank, world_size, folder):
    """The client takes nothing until the server has answered as many as may be under way, and never more."""
    wire = wire_of(folder, rank, world_size)
    if rank == 1:
        calls = []

        def forward(batch):
            calls.append(1)
            if len(calls) == 3:
                wire.board.write("three", {})
            return hidden_of(batch)

        serve(wire, [0], forward, in_flight=3)
        return len(calls)
    with farewell(wire, [1]):
        teacher = client(wire, rank, [1], in_flight=3)
        batches = [micro_batch(i) for i in range(6)]
        teacher.begin_step(batches)
        wire.board.read("three", TIMEOUT)  # three are done, none has been taken
        for batch in batches:
            assert torch.equal(teacher.signal(batch).hidden_states, hidden_of(batch))
    return 6


def test_the_teacher_works_ahead_of_the_students(rank_pool, tmp_path):
    assert rank_pool(2).run(works_ahead, folder=tmp_path) == [6, 6]


def failing_teacher(rank, world_size, folder, error):
    wire = wire_of(folder, rank, world_size)
    if rank == 2:
        calls = []

        def forward(batch):
            calls.append(1)
            if len(calls) == 4:
                raise error
            return hidden_of(batch)

        with pytest.raises(type(error), match="the fourth is bad"):
            serve(wire, [0, 1], forward)
        return None
    with pytest.raises(PeerLost) as caught, farewell(wire, [2]):
        teacher = client(wire, rank, [2], num_clients=2)
        for i in range(4):
            teacher.signal(micro_batch(i))
    return str(caught.value), caught.value.exit_code


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (DataError("the fourth is bad\n  fix: mend it"), "the fourth is bad\n  fix: mend it", EXIT_DATA),
        (RuntimeError("the fourth is bad"), "RuntimeError: the fourth is bad", 1),
    ],
)
def test_a_teacher_that_fails_ends_every_student_with_its_words_and_exit_code(error, words, code, rank_pool, tmp_path):
    first, second, _ = rank_pool(3).run(failing_teacher, folder=tmp_path, error=error)
    assert first == second == (f"the teacher on rank 2 ended: {words}", code)


def failing_before_a_late_batch(rank, world_size, folder):
    """The teacher fails at what it was asked ahead, while the student waits for a batch asked for after that."""
    wire = wire_of(folder, rank, world_size)
    if rank == 1:

        def forward(batch):
            wire.board.read("waiting", TIMEOUT)
            raise DataError("the first is bad")

        with pytest.raises(DataError, match="the first is bad"):
            serve(wire, [0], forward, in_flight=2)
        wire.board.read("told", TIMEOUT)  # its end of the wire stays until then
        return None
    with pytest.raises(PeerLost) as caught, farewell(wire, [1]):
        teacher = client(wire, rank, [1], in_flight=2)
        teacher.begin_step([micro_batch(i) for i in range(3)])
        wire.board.write("waiting", {})
        started = time.monotonic()
        teacher.signal(micro_batch(9))  # as an evaluation does between two steps
    seconds = time.monotonic() - started
    wire.board.write("told", {})
    return str(caught.value), caught.value.exit_code, seconds


def test_a_failing_teacher_is_heard_by_a_student_that_waits_for_a_later_answer(rank_pool, tmp_path):
    words, code, seconds = rank_pool(2).run(failing_before_a_late_batch, folder=tmp_path)[0]
    assert (words, code) == ("the teacher on rank 1 ended: the first is bad", EXIT_DATA)
    assert seconds < 0.5 * GRACE.total_seconds()


def failing_student(rank, world_size, folder):
    wire = wire_of(folder, rank, world_size)
    if rank == 2:
        with pytest.raises(PeerLost) as caught:
            serve(wire, [0, 1])
        return str(caught.value), caught.value.exit_code
    teacher = client(wire, rank, [2], num_clients=2)
    if rank == 0:
        with pytest.raises(PeerLost) as caught, farewell(wire, [2]):
            wire.board.read("failed", TIMEOUT)
            for i in range(100):  # some may be answered before the teacher has heard of rank 1
                teacher.signal(micro_batch(i))
        return str(caught.value), caught.value.exit_code
    with pytest.raises(NonFiniteLoss), farewell(wire, [2]):
        teacher.signal(micro_batch(0))
        raise NonFiniteLoss("inf")
    wire.board.write("failed", {})
    return None


def test_a_student_that_fails_ends_the_teacher_with_its_exit_code(rank_pool, tmp_path):
    other, _, (words, code) = rank_pool(3).run(failing_student, folder=tmp_path)
    assert words == "rank 1 (student) failed; its message says why"
    assert code == EXIT_NON_FINITE
    assert other == (f"the teacher on rank 2 ended: {words}", EXIT_NON_FINITE), "the other students are told as well"


def stopping(rank, world_size, folder):
    wire = wire_of(folder, rank, world_size)
    if rank == 1:
        answered = []
        with pytest.raises(RunStopped):
            serve(wire, [0], lambda batch: answered.append(1) or hidden_of(batch), wants_stop=lambda: len(answered) > 1)
        return None
    asked = []
    with pytest.raises(RunStopped), farewell(wire, [1]):
        teacher = client(wire, rank, [1], on_stop=lambda: asked.append(1))
        teacher.signal(micro_batch(0))
        assert asked == []
        teacher.signal(micro_batch(1))
        assert asked == [1]
        raise RunStopped("as asked")
    return True


def test_a_signal_at_the_teacher_stops_the_students_and_they_stop_the_teacher(rank_pool, tmp_path):
    assert rank_pool(2).run(stopping, folder=tmp_path)[0]


def stopping_by_its_second_rank(rank, world_size, folder):
    """Ranks 1 and 2 are one teacher; only the second is asked to end."""
    wire = wire_of(folder, rank, world_size)
    group = dist.new_group([1, 2])
    if rank > 0:
        mesh = Mesh(world_size=2, rank=rank - 1, tp_size=2, tp_group=group)
        server = TeacherServer(
            wire,
            mesh,
            Inbox(wire, [0]) if rank == 1 else None,
            [0],
            hidden_of,
            device=torch.device("cpu"),
            in_flight=4,
            wants_stop=lambda: rank == 2 and server.num_answers > 1,
        )
        with pytest.raises(RunStopped):
            server.run()
        return None
    asked = []
    with pytest.raises(RunStopped), farewell(wire, [1]):
        teacher = client(wire, rank, [1], on_stop=lambda: asked.append(1))
        for i in range(2):
            assert torch.equal(teacher.signal(micro_batch(i)).hidden_states, hidden_of(micro_batch(i)))
            assert len(asked) == i
        raise RunStopped("as asked")
    return True


def test_a_signal_at_any_rank_of_a_teacher_stops_the_students(rank_pool, tmp_path):
    assert rank_pool(3).run(stopping_by_its_second_rank, folder=tmp_path)[0]


def idle_for_longer_than_a_collective_may_wait(rank, world_size, folder):
    """Ranks 1 and 2 are one teacher; the student takes its time, as it does while it saves or exports."""
    limit = timedelta(seconds=2)
    wire = wire_of(folder, rank, world_size)
    group = dist.new_group([1, 2], timeout=limit)
    if rank > 0:
        mesh = Mesh(world_size=2, rank=rank - 1, tp_size=2, tp_group=group)
        inbox = Inbox(wire, [0]) if rank == 1 else None
        TeacherServer(wire, mesh, inbox, [0], hidden_of, device=torch.device("cpu"), in_flight=4).run()
        return None
    with farewell(wire, [1]):
        teacher = client(wire, rank, [1])
        for i in range(2):
            time.sleep(1.5 * i * limit.total_seconds())
            assert torch.equal(teacher.signal(micro_batch(i)).hidden_states, hidden_of(micro_batch(i)))
    return True


def test_a_teacher_of_several_ranks_waits_as_long_as_nobody_asks(rank_pool, tmp_path):
    assert rank_pool(3).run(idle_for_longer_than_a_collective_may_wait, folder=tmp_path)[0]


def facts_that_differ(rank, world_size, folder):
    wire = wire_of(folder, rank, world_size)
    if rank == 1:
        write_facts(wire.board, rank, {"width": 8, "vocabulary": 299})
        wire.barrier()
        write_failure(wire.board, rank, DataError("the weights are damaged"))
        wire.barrier()
        return None
    with pytest.raises(ConfigError, match=r"teacher on rank 1 .*\n  width: 8 there, 9 here\n  why"):
        compare_facts(wire.board, [1], {"width": 9, "vocabulary": 299}, TIMEOUT)
    told = compare_facts(wire.board, [1], {"width": 8}, TIMEOUT)
    assert told == [{"width": 8, "vocabulary": 299}], "more is told than is compared"
    wire.barrier()
    wire.barrier()
    with pytest.raises(PeerLost, match="teacher on rank 1 ended: the weights are damaged") as caught:
        compare_facts(wire.board, [1], {"width": 8}, TIMEOUT)
    assert caught.value.exit_code == EXIT_DATA
    with pytest.raises(PeerLost, match=r"nobody has written 'facts/7' within 1 s\n"):
        compare_facts(wire.board, [7], {}, timedelta(seconds=1))
    return True


def test_what_was_loaded_is_compared_and_a_teacher_that_cannot_load_is_not_waited_for(rank_pool, tmp_path):
    assert rank_pool(2).run(facts_that_differ, folder=tmp_path)[0]


def test_a_board_whose_host_ends_is_not_said_to_have_been_waited_for_in_vain():
    host = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    board = Board(dist.TCPStore("127.0.0.1", host.port, None, False))
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(board.read, "facts/1", TIMEOUT)
        time.sleep(0.5)
        del host  # nobody else holds it: the server ends
        with pytest.raises(PeerLost, match=r"rank 0, which keeps what ranks tell each other, has ended\n  why"):
            answer.result()
    assert time.monotonic() - started < 0.5 * TIMEOUT.total_seconds()


def silent_teacher(rank, world_size, folder, stays):
    wire = wire_of(folder, rank, world_size)
    if rank == 1:
        if stays:
            wire.board.read("over", TIMEOUT)
        return None  # its end of the wire goes with it
    teacher = client(wire, rank, [1])
    teacher._timeout = timedelta(seconds=1) if stays else TIMEOUT
    started = time.monotonic()
    with pytest.raises(PeerLost) as caught:
        teacher.signal(micro_batch(0))
    wire.board.write("over", {})
    return str(caught.value), time.monotonic() - started


@pytest.mark.parametrize(("stays", "why"), [(True, "Timed out waiting 1000ms"), (False, "")])
def test_a_teacher_that_is_gone_or_says_nothing_is_not_waited_for(stays, why, fresh_pool, tmp_path):
    words, seconds = fresh_pool(2).run(silent_teacher, folder=tmp_path, stays=stays)[0]
    assert words.startswith(f"rank 1 has ended or does not answer: {why}")
    assert words.endswith("\n  why: students and teachers of a run end together\n  fix: look at what rank 1 said last")
    assert seconds < 0.5 * TIMEOUT.total_seconds()


def test_the_last_ranks_are_the_teachers():
    roles = [Roles.of(rank, 5, 2) for rank in range(5)]
    assert [r.name for r in roles] == ["student"] * 3 + ["teacher"] * 2
    assert [r.rank_in_role for r in roles] == [0, 1, 2, 0, 1]
    assert [r.role_size for r in roles] == [3, 3, 3, 2, 2]
    with pytest.raises(ConfigError, match=r"teacher.ranks = 5, but the job has 5 ranks\n"):
        Roles.of(0, 5, 5)


@pytest.mark.parametrize("odd", [{"dtype": torch.bfloat16}, {"size": (8, WIDTH + 1)}])
def test_hidden_states_that_do_not_fit_the_room_made_for_them_are_refused(odd):
    backbone = SimpleNamespace(lm_head_shard=HeadShard(torch.zeros(5, WIDTH)), hidden_states=hidden_of)
    assert torch.equal(answer_of(backbone)(micro_batch(1)), hidden_of(micro_batch(1)))
    backbone.hidden_states = lambda batch: torch.zeros(**{"size": (8, WIDTH), **odd})
    with pytest.raises(ConfigError, match=r"its head is torch.float32, 3 wide(.|\n)*fix: set teacher.layout=plain"):
        answer_of(backbone)(micro_batch(1))
