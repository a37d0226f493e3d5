"""How attention heads are divided over tensor-parallel ranks. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from kdtrain.parallel.shard_spec import ShardSpec, even_spec


@dataclass(frozen=True, slots=True)
class HeadSharding:
    """query[r], key_value[r]: (start, stop) of the heads of rank r; each query head is with its key/value head.

    With fewer key/value heads than ranks, each rank holds one key/value head and some of the query heads of its group;
    several ranks then hold the same key/value head.
    """

    query: tuple[tuple[int, int], ...]
    key_value: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, num_heads: int, num_kv_heads: int, tp_size: int) -> HeadSharding:
        """As even as possible; lower ranks get more. Raises ValueError if a rank would have no query head."""
        group = num_heads // num_kv_heads
        if tp_size <= num_kv_heads:
            key_value = even_spec(0, num_kv_heads, tp_size).shards
            return cls(tuple((start * group, stop * group) for start, stop in key_value), key_value)
        holders = even_spec(0, tp_size, num_kv_heads).shards
        query: list[tuple[int, int]] = []
        for head, (first, last) in enumerate(holders):
            if last - first > group:
                raise ValueError(f"{last - first} ranks for the {group} query heads of a key/value head")
            parts = even_spec(0, group, last - first).shards
            query += [(head * group + start, head * group + stop) for start, stop in parts]
        kv = tuple((head, head + 1) for head, (first, last) in enumerate(holders) for _ in range(first, last))
        return cls(tuple(query), kv)

    def query_spec(self, dim: int, unit: int) -> ShardSpec:
        """Spec of a parameter with `unit` rows (dim 0) or columns per query head."""
        return ShardSpec(dim, tuple((start * unit, stop * unit) for start, stop in self.query))

    def key_value_spec(self, dim: int, unit: int) -> ShardSpec:
        """Spec of a parameter with `unit` rows or columns per key/value head; ranks may hold the same shard."""
        return ShardSpec(dim, tuple((start * unit, stop * unit) for start, stop in self.key_value))


def largest_tp(num_heads: int, num_kv_heads: int) -> int:
    """The largest tp at which every rank has a query head and either whole groups or a part of one group."""
    return max(num_kv_heads, num_kv_heads * (num_heads // num_kv_heads))
