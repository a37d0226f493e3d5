"""How attention is cut over tensor-parallel ranks: which query and key/value heads each rank holds. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.parallel.cut import Cut, even_cut


@dataclass(frozen=True, slots=True)
class HeadCut:
    """query[r], key_value[r]: (start, stop) of the heads of rank r. Every query head is with the head that it reads.

    With fewer key/value heads than ranks, ranks share them: each then holds one, and some of the query heads that
    read it.
    """

    query: tuple[tuple[int, int], ...]
    key_value: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, tp_size: int) -> HeadCut:
        """As even as possible; lower ranks get more. Raises ValueError when some rank would have no query head."""
        group = num_heads // num_kv_heads
        if tp_size <= num_kv_heads:
            key_value = even_cut(0, num_kv_heads, tp_size).pieces
            return cls(tuple((start * group, stop * group) for start, stop in key_value), key_value)
        sharers = even_cut(0, tp_size, num_kv_heads).pieces
        query: list[tuple[int, int]] = []
        for head, (first, last) in enumerate(sharers):
            if last - first > group:
                raise ValueError(f"{last - first} ranks for the {group} query heads of a key/value head")
            parts = even_cut(0, group, last - first).pieces
            query += [(head * group + start, head * group + stop) for start, stop in parts]
        kv = tuple((head, head + 1) for head, (first, last) in enumerate(sharers) for _ in range(first, last))
        return cls(tuple(query), kv)

    def query_cut(self, dim: int, unit: int) -> Cut:
        """Of a parameter with `unit` rows (dim 0) or columns per query head."""
        return Cut(dim, tuple((start * unit, stop * unit) for start, stop in self.query))

    def key_value_cut(self, dim: int, unit: int) -> Cut:
        """Of a parameter with `unit` rows or columns per key/value head; ranks may share a piece."""
        return Cut(dim, tuple((start * unit, stop * unit) for start, stop in self.key_value))


def largest_tp(num_heads: int, num_kv_heads: int) -> int:
    """The most ranks that can each have a query head and only heads that read the same or whole groups."""
    return max(num_kv_heads, num_kv_heads * (num_heads // num_kv_heads))
