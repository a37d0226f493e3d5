"""Start ranks of a script on this machine.   python launch/local_ranks.py RANKS SCRIPT.py [argument ...]

What `deepspeed --num_accelerators RANKS` does on one machine, without importing torch and DeepSpeed twice before the
first rank starts. Exit code: that of the first rank that failed, else 0. SIGTERM or SIGINT becomes a SIGTERM to every
rank: a training run saves its state and stops.
"""

import os
import signal
import socket
import subprocess
import sys
import time

POLL_S, GRACE_S = 0.05, 30.0
"""GRACE_S: how long other ranks may go on after one has failed, to end by themselves and say why."""


def start(count: int, command: list[str]) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        own = {name: str(value) for name, value in (world | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        ranks.append(subprocess.Popen([sys.executable, *command], env=os.environ | own))
    return ranks


def wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    code, deadline = 0, float("inf")
    while running := [rank for rank in ranks if rank.poll() is None]:
        if code == 0 and (failed := [rank.returncode for rank in ranks if rank.returncode]):
            code, deadline = failed[0], time.monotonic() + GRACE_S
        if time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(POLL_S)
    code = code or next((rank.returncode for rank in ranks if rank.returncode), 0)
    return 128 - code if code < 0 else code


def main(argv: list[str]) -> int:
    if len(argv) < 2 or not argv[0].isdecimal() or int(argv[0]) < 1:
        print(__doc__.strip(), file=sys.stderr)
        return 2
    ranks: list[subprocess.Popen[bytes]] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: [rank.terminate() for rank in ranks])
    ranks += start(int(argv[0]), argv[1:])
    return wait(ranks)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
