"""One optimizer step's micro-batches for one data rank, resumable from one integer; and fixed validation batches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from kdtrain.data.batch import Batch
from kdtrain.data.order import STORE_SHIFT, BlendOrder
from kdtrain.data.packing import num_sequences, pack, stack
from kdtrain.data.token_store import TokenStore
from kdtrain.errors import StoreMismatch


class StepLoader:
    """Iterator over optimizer steps: each item is the list of this data rank's micro-batches, on the CPU.

    Step n takes positions [n G, (n + 1) G) of one order that depends on seed, stores and weights alone (G =
    sequences_per_step); each data rank takes a contiguous share of them. So neither dp, tp nor the micro-batch size
    changes what a step learns from. With prefetch > 0 a thread works that many steps ahead. Does not communicate.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        seq_len: int,
        sequences_per_step: int,
        sequences_per_micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 1,
        reset_positions: bool = True,
        prefetch: int = 2,
    ) -> None:
        share, odd = divmod(sequences_per_step, dp_size)
        if odd or share % sequences_per_micro_batch:
            raise ValueError(
                f"sequences_per_step = {sequences_per_step} is not a multiple of dp_size {dp_size} x "
                f"sequences_per_micro_batch {sequences_per_micro_batch}"
            )
        self._stores = list(stores)
        self._seq_len, self._per_step, self._per_micro = seq_len, sequences_per_step, sequences_per_micro_batch
        self._first = dp_rank * share
        self._share = share
        self._reset_positions = reset_positions
        self._order = BlendOrder([num_sequences(s, seq_len) for s in stores], weights, seed)
        self._identity: dict[str, Any] = {
            "seed": seed,
            "seq_len": seq_len,
            "reset_positions": reset_positions,
            "stores": [store.manifest.fingerprint for store in stores],
            "weights": None if weights is None else list(weights),
        }
        self._position = 0
        self._prefetch = prefetch
        self._ahead: _Ahead | None = None

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches. Re-raises what failed in the prefetching thread."""
        if self._prefetch == 0:
            step = self._step(self._position)
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self, self._position)
            step = self._ahead.get()
        self._position += self._per_step
        return step

    def _step(self, position: int) -> list[Batch]:
        first = position + self._first
        return [
            self._micro_batch(first + offset, first + offset + self._per_micro)
            for offset in range(0, self._share, self._per_micro)
        ]

    def _micro_batch(self, start: int, stop: int) -> Batch:
        places = [self._order[position] for position in range(start, stop)]
        packed = [pack(self._stores[s], k, self._seq_len, reset_positions=self._reset_positions) for s, k in places]
        return stack(packed, [s << STORE_SHIFT | k for s, k in places])

    def state_dict(self, sequences: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps: sequences consumed so far (default: drawn) and the identity of the order."""
        return {"sequences": self._position if sequences is None else sequences, **self._identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after state["sequences"], in any layout. StoreMismatch if the order would be another one."""
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise StoreMismatch(
                    f"the checkpoint's data order differs in {key}: {state.get(key)} there, {mine} here\n"
                    "  why: the run would see some text twice and some never\n"
                    "  fix: continue with the same stores, weights, data.seq_len and run.seed, or start a new run"
                )
        self.close()
        self._position = int(state["sequences"])

    def close(self) -> None:
        """End the prefetching thread; the position stays what was handed out."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Ahead:
    """A thread that prepares steps in order into a bounded queue."""

    def __init__(self, loader: StepLoader, position: int) -> None:
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(maxsize=loader._prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(loader, position), name="kdtrain-data", daemon=True)
        self._thread.start()

    def _work(self, loader: StepLoader, position: int) -> None:
        while not self._stop.is_set():
            try:
                item: list[Batch] | BaseException = loader._step(position)
            except BaseException as error:  # handed over to the thread that waits for data
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            position += loader._per_step

    def get(self) -> list[Batch]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)


def validation_batches(
    store: TokenStore,
    *,
    seq_len: int,
    sequences_per_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_tokens: int | None = None,
    reset_positions: bool = True,
) -> Iterator[Batch]:
    """The first sequences of `store` in order, the incomplete last one included, dealt out over data ranks.

    max_tokens: stop after this many tokens, at least one sequence. Every data rank gets the same number of batches of
    the same shape; places without a sequence repeat the first one with a loss mask of 0.
    """
    total = max(1, -(-(store.num_tokens - 1) // seq_len))
    if max_tokens is not None:
        total = min(total, max(1, max_tokens // seq_len))
    per_round = sequences_per_batch * dp_size
    for start in range(0, total, per_round):
        mine = range(start + dp_rank * sequences_per_batch, start + (dp_rank + 1) * sequences_per_batch)
        packed = []
        for sequence in mine:
            ids, labels, mask, positions = pack(
                store, sequence if sequence < total else 0, seq_len, reset_positions=reset_positions
            )
            packed.append((ids, labels, mask if sequence < total else mask * 0.0, positions))
        yield stack(packed, list(mine))
