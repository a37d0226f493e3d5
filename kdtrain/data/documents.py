"""Where the documents of packed sequences begin and end: what attention needs to keep them apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Documents:
    """The documents of B whole sequences of S tokens, in the order of the T = B * S tokens one after the other.

    lengths: tokens of each, on the host; a document ends with its sequence at the latest. seq_len: S. offsets: int32
    [documents + 1], where each begins, then T; on the device of the tokens.
    """

    lengths: tuple[int, ...]
    seq_len: int
    offsets: Tensor

    @classmethod
    def of(cls, position_ids: Tensor) -> Documents:
        """Those of position_ids [B, S], on any device. Synchronises the device."""
        begins = document_begins(position_ids).flatten().nonzero().flatten().tolist()
        ends = [*begins[1:], position_ids.numel()]
        lengths = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        return cls._on_host(lengths, position_ids.shape[1]).to(position_ids.device)

    @classmethod
    def _on_host(cls, lengths: tuple[int, ...], seq_len: int) -> Documents:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return cls(lengths, seq_len, offsets)

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> Documents:
        """The same with offsets on `device` (asynchronous from pinned memory)."""
        return replace(self, offsets=self.offsets.to(device, non_blocking=True))

    def sequences(self, numbers: Sequence[int]) -> Documents:
        """Those of the sequences `numbers`, in that order, offsets on the host."""
        rows: list[list[int]] = [[]]
        for length in self.lengths:
            if sum(rows[-1]) == self.seq_len:
                rows.append([])
            rows[-1].append(length)
        return self._on_host(tuple(length for number in numbers for length in rows[number]), self.seq_len)


def document_begins(position_ids: Tensor) -> Tensor:
    """[B, S] -> bool [B, S]: a document begins with every row and wherever position_ids do not go up by one."""
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=1) != 1
    return begins
