"""One checkout's streamed loss, run once for every line of stdin; prints the seconds. Started by loss_pair.py.

    python benchmarks/loss_server.py CHECKOUT TASK TOKENS VOCABULARY

It imports nothing but that checkout's packages and benchmarks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

PROVIDER = "streamed-128MiB"


def serve(root: Path, task: str, tokens: int, vocab: int) -> None:
    """Until stdin ends."""
    sys.path[:0] = [str(root), str(root / "kernels"), str(root / "benchmarks")]
    from bench_loss_head import inputs, run
    from loss_providers import find

    arguments, loss = inputs(tokens, vocab, True), find(task, PROVIDER).loss
    for _ in sys.stdin:
        start = time.perf_counter()
        run(loss, arguments, True)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
