"""Other codings of the records of bench_logit_store.py; runs in a virtual environment with logit_store_peers.txt.

    python logit_store_peers.py RECORDS.npz FOLDER   # one JSON object per provider on standard output

All hold the same: per position the number of kept and of drawn ids, all ids, log-probabilities of the kept ones and of
the rest, label's log-probability and entropy, numbers in float16, ids in the narrowest type. Imports no kdtrain.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
import time
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np

FIELDS = ("kept", "drawn", "ids", "weights", "rest", "label", "entropy")
READS = 200
"""Random sequences that are read per provider."""


def load(path: Path) -> list[dict[str, np.ndarray]]:
    """Per sequence: kept, drawn [S] uint8; ids [N], narrowest type; weights [M], rest, label, entropy [S] float16."""
    with np.load(path) as found:
        return [{name: found[f"{name}_{number}"] for name in FIELDS} for number in range(int(found["sequences"]))]


class Planes:
    """A frame per field and byte of a number, one file per store: what a general compressor makes of plain types."""

    def __init__(self, pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> None:
        self.pack, self.unpack = pack, unpack

    def encode(self, records: dict[str, np.ndarray]) -> bytes:
        frames = []
        for name in FIELDS:
            columns = records[name].view(np.uint8).reshape(len(records[name]), -1).T
            frames += [self.pack(np.ascontiguousarray(column).tobytes()) for column in columns]
        sizes = np.array([len(frame) for frame in frames], dtype="<u4")
        return bytes([len(frames)]) + sizes.tobytes() + b"".join(frames)

    def decode(self, data: bytes, types: dict[str, np.dtype]) -> dict[str, np.ndarray]:
        sizes = np.frombuffer(data, "<u4", data[0], 1)
        ends = 1 + 4 * data[0] + np.cumsum(sizes)
        planes = iter([self.unpack(data[end - size : end]) for end, size in zip(ends, sizes, strict=True)])
        found = {}
        for name in FIELDS:
            columns = [np.frombuffer(next(planes), np.uint8) for _ in range(types[name].itemsize)]
            found[name] = np.stack(columns, 1).reshape(-1).view(types[name])
        return found

    def write(self, sequences: list[dict[str, np.ndarray]], path: Path) -> None:
        data = [self.encode(records) for records in sequences]
        path.write_bytes(b"".join(data))
        self.ends = np.cumsum([len(one) for one in data])

    def open(self, path: Path, sequences: list[dict[str, np.ndarray]]) -> Callable[[int], dict[str, np.ndarray]]:
        file = path.open("rb", buffering=0)
        types = {name: array.dtype for name, array in sequences[0].items()}

        def read(number: int) -> dict[str, np.ndarray]:
            start = int(self.ends[number - 1]) if number else 0
            file.seek(start)
            return self.decode(file.read(int(self.ends[number]) - start), types)

        return read


def table_of(sequences: list[dict[str, np.ndarray]]):
    """An Arrow table with a row per position; ids and weights are lists."""
    import pyarrow as pa

    def joined(name: str) -> np.ndarray:
        return np.concatenate([records[name] for records in sequences])

    def lists(values: str, counts: np.ndarray):
        ends = np.append(0, np.cumsum(counts, dtype=np.int64)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(joined(values)))

    kept, drawn = joined("kept"), joined("drawn")
    columns = {"ids": lists("ids", kept.astype(int) + drawn), "weights": lists("weights", kept)}
    return pa.table(columns | {name: pa.array(joined(name)) for name in ("rest", "label", "entropy")})


def arrays_of(columns) -> dict[str, np.ndarray]:
    """What `table_of` was given, from the columns of a range of rows."""
    found = {name: columns[name].to_numpy(zero_copy_only=False) for name in ("rest", "label", "entropy")}
    for name in ("ids", "weights"):
        found[name] = columns[name].flatten().to_numpy()
    counts = {name: np.diff(columns[name].offsets.to_numpy()) for name in ("ids", "weights")}
    found["kept"] = counts["weights"].astype(np.uint8)
    found["drawn"] = (counts["ids"] - counts["weights"]).astype(np.uint8)
    return found


class Parquet:
    """zstd. groups: a row group per sequence, else pyarrow's default of 2^20 positions. tuned: neither dictionaries nor
    statistics."""

    def __init__(self, *, groups: bool = False, tuned: bool = False) -> None:
        self.groups, self.options = groups, {"use_dictionary": False, "write_statistics": False} if tuned else {}
        self.note = ""

    def write(self, sequences: list[dict[str, np.ndarray]], path: Path) -> None:
        import pyarrow.parquet as pq

        size = len(sequences[0]["rest"]) if self.groups else None
        pq.write_table(table_of(sequences), path, row_group_size=size, compression="zstd", **self.options)
        about = pq.read_metadata(path)
        self.note = f"footer {about.serialized_size / about.num_row_groups:.0f} bytes a row group"

    def open(self, path: Path, sequences: list[dict[str, np.ndarray]]) -> Callable[[int], dict[str, np.ndarray]]:
        import pyarrow.parquet as pq

        file, size = pq.ParquetFile(path, memory_map=True), len(sequences[0]["rest"])
        per_group = 2**20 // size

        def read(number: int) -> dict[str, np.ndarray]:
            table = file.read_row_group(number if self.groups else number // per_group, use_threads=False)
            if not self.groups:
                table = table.slice(number % per_group * size, size)
            return arrays_of({name: table[name].combine_chunks() for name in table.column_names})

        return read


class Vortex:
    """vortex-data with its defaults, but no cache of segments: every read comes from the page cache, as elsewhere."""

    def write(self, sequences: list[dict[str, np.ndarray]], path: Path) -> None:
        import vortex

        vortex.io.write(table_of(sequences), str(path))

    def open(self, path: Path, sequences: list[dict[str, np.ndarray]]) -> Callable[[int], dict[str, np.ndarray]]:
        import vortex

        scan, size = vortex.open(str(path), without_segment_cache=True).to_repeated_scan(), len(sequences[0]["rest"])

        def read(number: int) -> dict[str, np.ndarray]:
            rows = scan.execute(row_range=(number * size, (number + 1) * size)).read_all().to_arrow_array()
            return arrays_of({name: rows.field(name) for name in rows.type.names})

        return read


def providers() -> dict:
    """By name, with the versions that count."""
    import zstandard

    def zstd(level: int) -> Planes:
        return Planes(zstandard.ZstdCompressor(level=level).compress, zstandard.ZstdDecompressor().decompress)

    xz = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    return {
        "plain types": Planes(bytes, bytes),
        "byte planes, zlib 6": Planes(lambda data: zlib.compress(data, 6), zlib.decompress),
        "byte planes, zstd 3": zstd(3),
        "byte planes, zstd 19": zstd(19),
        "byte planes, lzma 6": Planes(
            lambda data: lzma.compress(data, lzma.FORMAT_RAW, filters=xz),
            lambda data: lzma.decompress(data, lzma.FORMAT_RAW, filters=xz),
        ),
        "parquet + zstd": Parquet(),
        "parquet + zstd, a row group per sequence": Parquet(groups=True),
        "parquet + zstd, the same, tuned": Parquet(groups=True, tuned=True),
        "vortex": Vortex(),
    }


def measure(provider, sequences: list[dict[str, np.ndarray]], path: Path) -> dict:
    """bytes of the file, seconds of writing it and of each random read; AssertionError if a read is wrong."""
    start = time.perf_counter()
    provider.write(sequences, path)
    written = time.perf_counter() - start
    read, order, times = provider.open(path, sequences), random.Random(0), []
    for number, records in enumerate(sequences):  # warm, and right
        found = read(number)
        for name, array in records.items():
            np.testing.assert_array_equal(found[name], array)
    for _ in range(READS):
        number = order.randrange(len(sequences))
        start = time.perf_counter()
        read(number)
        times.append(time.perf_counter() - start)
    note = getattr(provider, "note", "")
    return {"bytes": path.stat().st_size, "written_s": written, "times": times, "note": note}


def main() -> None:
    sequences, folder = load(Path(sys.argv[1])), Path(sys.argv[2])
    versions = " ".join(f"{name} {version(name)}" for name in ("numpy", "pyarrow", "vortex-data", "zstandard"))
    for name, provider in providers().items():
        answer = measure(provider, sequences, folder / "peer")
        print(json.dumps({"provider": name, "versions": versions, **answer}), flush=True)


if __name__ == "__main__":
    main()
