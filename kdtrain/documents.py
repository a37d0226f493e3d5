"""Where the documents of packed sequences begin and end, so that attention does not cross from one to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of B whole sequences of S tokens, in the order of the T = B * S tokens one after the other.

    lengths: tokens of each, on the host; no document crosses the end of a sequence. seq_len: S. offsets: int32
    [documents + 1], where each begins, then T; on the device of the tokens. firsts [B + 1]: the number of each
    sequence's first document, then of documents. ValueError for a document that crosses the end of a sequence.
    """

    lengths: tuple[int, ...]
    seq_len: int
    offsets: Tensor
    firsts: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        ends = accumulate(self.lengths)
        firsts = (0, *(number for number, end in enumerate(ends, 1) if end % self.seq_len == 0))
        if sum(self.lengths) != (len(firsts) - 1) * self.seq_len:
            raise ValueError(f"documents of {self.lengths} tokens do not fill sequences of {self.seq_len}")
        object.__setattr__(self, "firsts", firsts)

    @classmethod
    def of(cls, position_ids: Tensor) -> Documents:
        """Those of position_ids [B, S], on any device. Synchronises the device unless it is the CPU."""
        return cls.beginning(document_begins(position_ids).cpu()).to(position_ids.device)

    @classmethod
    def beginning(cls, begins: Tensor) -> Documents:
        """Documents that begin where `begins` (bool [B, S], on the host) is true, as in the first column it must be."""
        firsts = begins.flatten().nonzero().flatten().tolist()
        ends = [*firsts[1:], begins.numel()]
        lengths = tuple(end - first for first, end in zip(firsts, ends, strict=True))
        return cls(lengths, begins.shape[1], torch.tensor([*firsts, begins.numel()], dtype=torch.int32))

    @classmethod
    def cat(cls, parts: Sequence[Documents]) -> Documents:
        """Those of the sequences of all, in order, on the device of their offsets. Does not synchronise."""
        if len({part.seq_len for part in parts}) != 1:
            raise ValueError(f"documents of sequences of {[part.seq_len for part in parts]} tokens")
        begins = accumulate((part.num_tokens for part in parts[:-1]), initial=0)
        offsets = [part.offsets + begin for part, begin in zip(parts, begins, strict=True)]
        lengths = tuple(length for part in parts for length in part.lengths)
        return cls(lengths, parts[0].seq_len, torch.cat([*(other[:-1] for other in offsets[:-1]), offsets[-1]]))

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return len(self.firsts) - 1, self.seq_len

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return (len(self.firsts) - 1) * self.seq_len

    def to(self, device: torch.device | str) -> Documents:
        """The same with offsets on `device` (asynchronous from pinned memory to a device)."""
        return replace(self, offsets=self.offsets.to(device, non_blocking=self.offsets.is_cpu))

    def pin_memory(self) -> Documents:
        """The same with offsets in pinned memory, from which copies to a CUDA device are asynchronous."""
        return replace(self, offsets=self.offsets.pin_memory())

    def sequences(self, start: int, stop: int) -> Documents:
        """Those of the sequences [start, stop), on the device of the offsets. Does not synchronise."""
        first, last = self.firsts[start], self.firsts[stop]
        offsets = self.offsets[first : last + 1] - start * self.seq_len
        return Documents(self.lengths[first:last], self.seq_len, offsets)


def document_begins(position_ids: Tensor) -> Tensor:
    """[B, S] -> bool [B, S]: a document begins with every row and wherever position_ids do not go up by one."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins
