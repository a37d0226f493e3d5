"""Micro-batches of each optimizer step for one data rank, resumable from one integer; and fixed validation batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from kdtrain.batch import Batch
from kdtrain.data.context import Share, cut_sequences
from kdtrain.data.order import BlendOrder, numbering_of
from kdtrain.data.packing import PackingSpec, key_space, num_sequences, pack, sequence_keys, stack
from kdtrain.data.token_store import TokenStore
from kdtrain.errors import StoreMismatch
from kdtrain.stores.keys import KeySpace

WHOLE = Share()


def packing_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `PackingSpec` in a `state_dict` of a loader; older ones have them beside the others."""
    found: Mapping[str, Any] | None = state.get("packing")
    if found is None:
        found = {name: state[name] for name in ("seq_len", "reset_positions", "sequence_prefix") if name in state}
    return dict(found)


def sequence_prefix_of(state: Mapping[str, Any]) -> tuple[int, ...]:
    """The sequence prefix of the run that wrote this `state_dict` of a loader; () in older states, without the key."""
    return tuple(packing_of(state).get("sequence_prefix", ()))


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sequences of an optimizer step, over all data ranks, and of a micro-batch of one of them."""

    sequences_per_step: int
    sequences_per_micro_batch: int


class StepLoader:
    """Iterator over optimizer steps: each item is the list of this data rank's micro-batches, on the CPU.

    Step n takes positions [n G, (n + 1) G) of one order that depends on seed, packing, stores and weights alone, not on
    the order in which the stores are listed (G = sequences_per_step); each data rank takes a contiguous share of them,
    and of each sequence its part among cp ranks. So neither dp, cp, tp nor the micro-batch size changes the sequences
    of a step. With prefetch > 0 a thread prepares that many steps ahead. pin_memory: return batches in pinned memory,
    from which copies to a CUDA device are asynchronous; needs such a device. Does not communicate.

    Raises ValueError if a step cannot be divided over ranks and micro-batches, DataError as BlendOrder, StoreMismatch
    as KeySpace.
    """

    def __init__(
        self,
        stores: Sequence[TokenStore],
        weights: Sequence[float] | None = None,
        *,
        packing: PackingSpec,
        shape: StepShape,
        share: Share = WHOLE,
        seed: int = 1,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        per_rank, odd = divmod(shape.sequences_per_step, share.dp_size)
        if odd or per_rank % shape.sequences_per_micro_batch:
            raise ValueError(
                f"sequences_per_step = {shape.sequences_per_step} is not a multiple of dp_size {share.dp_size} x "
                f"sequences_per_micro_batch {shape.sequences_per_micro_batch}"
            )
        self._stores, self._fingerprints = list(stores), [store.manifest.fingerprint for store in stores]
        self._packing, self._shape, self._share = packing, shape, share
        self._per_rank = per_rank
        self._weights, self._seed = None if weights is None else list(weights), seed
        self.keys: KeySpace = key_space(stores, packing)
        """The keys of the sequences, `Batch.sample_ids`."""
        self._keys = [sequence_keys(store, packing) for store in stores]
        self._number(numbering_of(self._fingerprints))
        self._position = 0
        self._prefetch, self._pin_memory = prefetch, pin_memory
        self._ahead: _Ahead | None = None

    def _number(self, numbering: list[int]) -> None:
        sizes = [num_sequences(store, self._packing) for store in self._stores]
        self._numbering = numbering
        self._order = BlendOrder(sizes, self._weights, self._seed, numbering)

    def __iter__(self) -> StepLoader:
        return self

    def __next__(self) -> list[Batch]:
        """The next step's micro-batches. Raises errors of the prefetching thread."""
        stride = self._shape.sequences_per_step
        if self._prefetch == 0:
            step = self._step(self._position)
        else:
            if self._ahead is None:
                self._ahead = _Ahead(self._step, self._position, stride, self._prefetch)
            step = self._ahead.get()
        self._position += stride
        return step

    def _step(self, position: int) -> list[Batch]:
        first, at_once = position + self._share.dp_rank * self._per_rank, self._shape.sequences_per_micro_batch
        return [
            self._micro_batch(first + offset, first + offset + at_once) for offset in range(0, self._per_rank, at_once)
        ]

    def _micro_batch(self, start: int, stop: int) -> Batch:
        places = [self._order[position] for position in range(start, stop)]
        packed = [pack(self._stores[s], k, self._packing) for s, k in places]
        batch = stack(packed, [self._keys[s].key(k) for s, k in places])
        batch = cut_sequences(batch, self._share.cp_rank, self._share.cp_size)
        # Pinned in the prefetching thread, so that training does not wait; torch uses the current device's context.
        return batch.pin_memory() if self._pin_memory else batch

    def draws(self, sequences: int) -> list[tuple[int, int]]:
        """(sequences of the store, sequences drawn from it) of each store, in the first `sequences` of the order."""
        return list(zip(self._order.sizes, self._order.draws(sequences), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """JSON-able state for a checkpoint: sequences that the whole run has been given, without prefetched ones, and
        everything that the order depends on, stores in the order of their numbers."""
        weights = self._weights
        return {
            "sequences": self._position,
            "seed": self._seed,
            "packing": self._packing.as_json(),
            "stores": [self._fingerprints[place] for place in self._numbering],
            "weights": None if weights is None else [weights[place] for place in self._numbering],
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises StoreMismatch, naming both values, if a run in `state` drew from another order than this one.

        The stores may be listed in another order, each with its weight.
        """
        if state.get("seed") != self._seed:
            raise _mismatch("run.seed", state.get("seed"), self._seed)
        if (found := self._packing.difference(packing_of(state))) is not None:
            raise _mismatch(*found)
        stores, weights = list(state.get("stores", ())), state.get("weights")
        if sorted(stores) != sorted(self._fingerprints):
            raise _mismatch("data.train (fingerprints of the stores)", stores, self._fingerprints)
        if weights is not None:
            weights = [weights[stores.index(fingerprint)] for fingerprint in self._fingerprints]
        if weights != self._weights:
            raise _mismatch("data.train_weights (in the order of data.train)", weights, self._weights)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after state["sequences"], in any layout, with the stores' numbers of `state`.

        StoreMismatch as `check_state`.
        """
        self.check_state(state)
        self._number(numbering_of(self._fingerprints, state["stores"]))
        self.seek(int(state["sequences"]))

    def seek(self, sequences: int) -> None:
        """Continue after this many sequences of the whole run."""
        self.close()
        self._position = sequences

    def close(self) -> None:
        """End the prefetching thread; the position is that of the last step returned."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def _mismatch(name: str, there: object, here: object) -> StoreMismatch:
    return StoreMismatch(
        f"the checkpoint's data order differs in {name}: {there} in the checkpoint, {here} here\n"
        "  why: some text would be used twice and some never\n"
        "  fix: continue with the same stores, weights, data.seq_len, data.sequence_prefix and run.seed, or start a "
        "new run"
    )


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
    packing: PackingSpec,
    sequences_per_batch: int,
    share: Share = WHOLE,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """The first sequences of `store` in order, the incomplete last one included, distributed over data ranks.

    max_tokens: stop after this many tokens of the store, at least one sequence. Every data rank gets the same number of
    batches of the same shape, of each sequence its part among cp ranks; positions without a sequence repeat sequence 0
    with a loss mask of 0. Does not communicate.
    """
    total = max(1, -(-(store.num_tokens - 1) // packing.stride))
    if max_tokens is not None:
        total = min(total, max(1, max_tokens // packing.stride))
    keys = sequence_keys(store, packing)
    for start in range(0, total, sequences_per_batch * share.dp_size):
        first = start + share.dp_rank * sequences_per_batch
        places = [k if k < total else 0 for k in range(first, first + sequences_per_batch)]
        batch = stack([pack(store, k, packing) for k in places], [keys.key(k) for k in places])
        batch.loss_mask[max(total - first, 0) :] = 0.0
        yield cut_sequences(batch, share.cp_rank, share.cp_size)
