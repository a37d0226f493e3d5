"""Micro-batches of each optimizer step for one data rank, resumable from one integer; and fixed validation batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kdtrain.batch import Batch
from kdtrain.data.context import cut_sequences
from kdtrain.data.order import STORE_SHIFT, BlendOrder
from kdtrain.data.packing import Packing, num_sequences, pack, stack
from kdtrain.data.token_store import TokenStore
from kdtrain.errors import StoreMismatch

_NAMES = {
    "seed": "run.seed",
    "seq_len": "data.seq_len",
    "reset_positions": "data.reset_positions",
    "sequence_prefix": "data.sequence_prefix (ids)",
    "stores": "data.train (fingerprints of the stores)",
    "weights": "data.train_weights",
}


def sequence_prefix_of(state: dict[str, Any]) -> tuple[int, ...]:
    """The sequence prefix of the run that wrote this `state_dict` of a loader; () in older states, without the key."""
    return tuple(state.get("sequence_prefix", ()))


class StepLoader:
    """Iterator over optimizer steps: each item is the list of this data rank's micro-batches, on the CPU.

    Step n takes positions [n G, (n + 1) G) of one order that depends on seed, stores and weights alone (G =
    sequences_per_step); each data rank takes a contiguous share of them, and of each sequence its part among cp ranks.
    So neither dp, cp, tp nor the micro-batch size changes the sequences of a step. With prefetch > 0 a thread prepares
    that many steps ahead. start_sequence: sequences that the whole run consumed before. pin_memory: return batches in
    pinned memory, from which copies to a CUDA device are asynchronous; needs such a device. Does not communicate.

    Raises ValueError if a step cannot be divided over ranks and micro-batches, DataError as BlendOrder.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        packing: Packing,
        sequences_per_step: int,
        sequences_per_micro_batch: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        seed: int = 1,
        prefetch: int = 2,
        start_sequence: int = 0,
        pin_memory: bool = False,
    ) -> None:
        share, odd = divmod(sequences_per_step, dp_size)
        if odd or share % sequences_per_micro_batch:
            raise ValueError(
                f"sequences_per_step = {sequences_per_step} is not a multiple of dp_size {dp_size} x "
                f"sequences_per_micro_batch {sequences_per_micro_batch}"
            )
        self._stores = list(stores)
        self._packing, self._per_step, self._per_micro = packing, sequences_per_step, sequences_per_micro_batch
        self._first, self._share = dp_rank * share, share
        self._part = cp_rank, cp_size
        self._order = BlendOrder([num_sequences(s, packing) for s in stores], weights, seed)
        self._identity: dict[str, Any] = {
            "seed": seed,
            "seq_len": packing.seq_len,
            "reset_positions": packing.reset_positions,
            "sequence_prefix": list(packing.sequence_prefix),
            "stores": [store.manifest.fingerprint for store in stores],
            "weights": None if weights is None else list(weights),
        }
        self._position = start_sequence
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._ahead: _Ahead | None = None

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches. Raises errors of the prefetching thread."""
        if self._prefetch == 0:
            step = self._step(self._position)
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self._step, self._position, self._per_step, self._prefetch)
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
        packed = [pack(self._stores[s], k, self._packing) for s, k in places]
        batch = cut_sequences(stack(packed, [s << STORE_SHIFT | k for s, k in places]), *self._part)
        # Pinned in the prefetching thread, so that training does not wait; torch uses the current device's context.
        return batch.pin_memory() if self._pin_memory else batch

    def draws(self, sequences: int) -> list[tuple[int, int]]:
        """(sequences of the store, sequences drawn from it) of each store, in the first `sequences` of the order."""
        return list(zip(self._order.sizes, self._order.draws(sequences), strict=True))

    def state_dict(self, sequences_consumed: int | None = None) -> dict[str, Any]:
        """JSON-able state for a checkpoint: sequences consumed by the whole run (default: those returned so far,
        without
        prefetched ones) and everything that the order depends on."""
        consumed = self._position if sequences_consumed is None else sequences_consumed
        return {"sequences": consumed, **self._identity}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises StoreMismatch, naming both values, if a run in `state` drew from another order than this one."""
        state = {**state, "sequence_prefix": list(sequence_prefix_of(state))}
        for key, mine in self._identity.items():
            if state.get(key) != mine:
                raise StoreMismatch(
                    f"the checkpoint's data order differs in {_NAMES[key]}: {state.get(key)} in the checkpoint, "
                    f"{mine} here\n  why: some text would be used twice and some never\n"
                    "  fix: continue with the same stores, weights, data.seq_len, data.sequence_prefix and run.seed, "
                    "or start a new run"
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after state["sequences"], in any layout. StoreMismatch as `check_state`."""
        self.check_state(state)
        self.close()
        self._position = int(state["sequences"])

    def close(self) -> None:
        """End the prefetching thread; the position is that of the last step returned."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


class _Ahead:
    """A thread that prepares steps in order, `depth` of them ahead; each is a future, which may hold an error."""

    def __init__(self, make: Callable[[int], list[Batch]], position: int, stride: int, depth: int) -> None:
        self._make, self._stride, self._next = make, stride, position
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdtrain-data")
        self._waiting: deque[Future[list[Batch]]] = deque()
        for _ in range(depth):
            self._submit()

    def _submit(self) -> None:
        self._waiting.append(self._executor.submit(self._make, self._next))
        self._next += self._stride

    def get(self) -> list[Batch]:
        """The next step; an error of the thread is raised here, again at each later call."""
        step = self._waiting[0].result()
        self._waiting.popleft()
        self._submit()
        return step

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)


def validation_batches(
    store: TokenStore,
    *,
    packing: Packing,
    sequences_per_batch: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    cp_rank: int = 0,
    cp_size: int = 1,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The first sequences of `store` in order, the incomplete last one included, distributed over data ranks.

    max_tokens: stop after this many tokens of the store, at least one sequence. Every data rank gets the same number of
    batches of the same shape, of each sequence its part among cp ranks; positions without a sequence repeat sequence 0
    with a loss mask of 0.
    """
    total = max(1, -(-(store.num_tokens - 1) // packing.stride))
    if max_tokens is not None:
        total = min(total, max(1, max_tokens // packing.stride))
    for start in range(0, total, sequences_per_batch * dp_size):
        first = start + dp_rank * sequences_per_batch
        places = range(first, first + sequences_per_batch)
        packed = [pack(store, k if k < total else 0, packing) for k in places]
        batch = stack(packed, [k if k < total else 0 for k in places])
        batch.loss_mask[max(total - first, 0) :] = 0.0
        yield cut_sequences(batch, cp_rank, cp_size)
