"""Start ranks of a script on this machine.   python launch/local_ranks.py RANKS SCRIPT.py [argument ...]

What `deepspeed --num_accelerators RANKS` does, without importing DeepSpeed before the first rank starts. Exit code:
that of the first rank that failed, otherwise 0. SIGTERM, SIGINT (Ctrl-C) or SIGHUP becomes one SIGTERM to every rank.
"""

import os
import signal
import socket
import subprocess
import sys
import time

POLL_S, GRACE_S = 0.05, 30.0  # GRACE_S: how long other ranks may go on after one has failed, to print the reason


def start(count: int, command: list[str], ranks: list[subprocess.Popen[bytes]]) -> None:
    """Append each rank to `ranks` as soon as it runs."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for rank in range(count):
        own = {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        # In a process group of its own: a terminal sends Ctrl-C to its foreground group, and a rank needs a SIGTERM.
        ranks.append(subprocess.Popen([sys.executable, *command], env=os.environ | own, process_group=0))


def wait(ranks: list[subprocess.Popen[bytes]], signals: list[int]) -> int:
    """Exit code of the job. signals: those that arrived, also before all ranks were started."""
    code, deadline = 0, float("inf")
    while running := [rank for rank in ranks if rank.poll() is None]:
        for rank in running if signals and signals.pop() else ():
            rank.terminate()
        if code == 0 and (failed := [rank.returncode for rank in ranks if rank.returncode]):
            code, deadline = failed[0], time.monotonic() + GRACE_S
        for rank in running if time.monotonic() > deadline else ():
            rank.kill()
        time.sleep(POLL_S)
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 1:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    ranks, signals = [], []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: signals.append(number))
    try:
        start(int(argv[0]), argv[1:], ranks)
    except OSError:  # the ranks that run would wait for the others
        for rank in ranks:
            rank.kill()
        raise
    return wait(ranks, signals)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
