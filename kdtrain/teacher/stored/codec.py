"""The bytes of one sequence's records: docs/design/0020-logit-store.md. Equal records have equal bytes everywhere.

A probability is stored as its log2 in steps of 2^-10, except for the largest part of each position (a kept id or the
rest), which is what the others leave of 1. So the parts of a position sum to 1, each stored one is within ROUNDING of
its value, and the largest within ROUNDING times the sum of the others. Numbers per position are float16.
"""

from __future__ import annotations

import struct

import numpy as np

from kdtrain.errors import DataError
from kdtrain.teacher.stored.bits import Array, Reader, pack_fixed, pack_golomb
from kdtrain.teacher.stored.records import HIDDEN_TYPES, RecordFields, SequenceRecords

CODEC = 1
"""Version of the bytes."""
STEPS = 1024
"""Steps of an octave."""
ROUNDING = 2 ** (0.5 / STEPS) - 1
"""Largest relative error of a stored probability of at least SMALLEST, 3.4e-4. Smaller ones are stored as SMALLEST."""
SMALLEST = 2.0 ** -(1 + 65534 / STEPS)
"""Smallest probability that is not stored as 0: 2^-65."""
SUM_TOLERANCE = 1e-3
"""How far the probabilities of a position may be from 1 before they are refused as wrong."""
_SIZE = struct.Struct("<I")
_PROBABILITIES = np.append(0.0, np.exp2(-1 - np.arange(65535) / STEPS))
"""By code."""


def encode(records: SequenceRecords, fields: RecordFields) -> bytes:
    """The bytes of a sequence's records. ValueError, naming a position, for records that `fields` do not allow."""
    return b"".join(sections(records, fields).values())


def sections(records: SequenceRecords, fields: RecordFields) -> dict[str, bytes]:
    """The parts of `encode`, by name and in their order."""
    _check(records, fields)
    kept_order = np.argsort((_rows(records.kept) << 31) | records.kept_ids)
    drawn_order = np.argsort((_rows(records.drawn) << 31) | records.drawn_ids)
    place, rest_codes, kept_codes = _codes(records, records.kept_weights[kept_order])
    found = {
        "size": _SIZE.pack(len(records)),
        "kept": pack_fixed(records.kept),
        "drawn": pack_fixed(records.drawn),
        "kept ids": pack_golomb(_gaps(records.kept_ids[kept_order], records.kept, "kept")),
        "drawn ids": pack_golomb(_gaps(records.drawn_ids[drawn_order], records.drawn, "drawn")),
    }
    if records.counts is not None:
        found["counts"] = pack_golomb(records.counts[drawn_order] - 1)
    found |= {"largest": pack_fixed(place), "rest": pack_fixed(rest_codes), "kept weights": pack_fixed(kept_codes)}
    found |= {"label": _half(records.label_log_prob), "entropy": _half(records.entropy)}
    if records.boundary is not None:
        found["boundary"] = _half(records.boundary)
    if records.hidden is not None:
        found["hidden"] = records.hidden.tobytes()
    return found


def decode(data: bytes, fields: RecordFields) -> SequenceRecords:
    """The records that `encode` was given, weights within rounding. DataError if the bytes are none of these fields."""
    try:
        return _decode(data, fields)
    except (ValueError, IndexError, struct.error) as error:
        raise DataError(
            f"these {len(data)} bytes are no records of a sequence: {error}\n"
            "  why: they were written with other fields, or are damaged\n  fix: make the store again"
        ) from error


def _decode(data: bytes, fields: RecordFields) -> SequenceRecords:
    reader = Reader(data)
    size = int(reader.array("<u4", 1)[0])
    if size * 4 > len(data):  # its float16 numbers alone: damage must not ask for gigabytes
        raise ValueError(f"{size} positions")
    kept, drawn = reader.fixed(size), reader.fixed(size)
    kept_ids = _ids(reader.golomb(int(kept.sum())), kept, fields)
    drawn_ids = _ids(reader.golomb(int(drawn.sum())), drawn, fields)
    counts = reader.golomb(len(drawn_ids)) + 1 if fields.draws == "counts" else None
    place = reader.fixed(size)
    rest, weights = _probabilities(kept, place, reader)
    label_log_prob, entropy = (reader.array("<f2", size).astype(np.float32) for _ in range(2))
    boundary = reader.array("<f2", size).astype(np.float32) if fields.boundary else None
    hidden = None
    if fields.hidden_size:
        flat = reader.array(HIDDEN_TYPES[fields.hidden_dtype], size * fields.hidden_size)
        hidden = flat.reshape(size, fields.hidden_size)
    reader.end()
    return SequenceRecords(
        *(kept, kept_ids, weights, drawn, drawn_ids, counts, rest), label_log_prob, entropy, boundary, hidden
    )


def _check(records: SequenceRecords, fields: RecordFields) -> None:
    """Raise ValueError for arrays of other shapes than `fields` say, and for numbers that cannot be stored."""
    size, optional = len(records), {"counts": records.counts, "boundary": records.boundary, "hidden": records.hidden}
    wanted = {"counts": fields.draws == "counts", "boundary": fields.boundary, "hidden": fields.hidden_size > 0}
    for name, value in optional.items():
        if (value is not None) != wanted[name]:
            raise ValueError(f"{name} is {'missing' if value is None else 'given'}, the store's fields say otherwise")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("kept", "drawn", "label_log_prob", "entropy"), (size,))
    shapes |= {"boundary": (size,), "kept_ids": (int(records.kept.sum()),), "drawn_ids": (int(records.drawn.sum()),)}
    shapes |= {"kept_weights": shapes["kept_ids"], "counts": shapes["drawn_ids"], "hidden": (size, fields.hidden_size)}
    for name, shape in shapes.items():
        value = getattr(records, name)
        if value is not None and value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, need {shape}")
    if records.hidden is not None and records.hidden.dtype != HIDDEN_TYPES[fields.hidden_dtype]:
        raise ValueError(f"hidden has dtype {records.hidden.dtype}, need {HIDDEN_TYPES[fields.hidden_dtype]}")
    for ids in (records.kept_ids, records.drawn_ids):
        if len(ids) and not 0 <= ids.min() <= ids.max() < fields.vocab_size:
            raise ValueError(f"ids of {ids.min()} to {ids.max()} are not in [0, {fields.vocab_size})")
    if records.counts is not None and records.counts.min(initial=1) < 1:
        raise ValueError("a drawn id has a count of 0")
    if fields.draws == "none" and records.drawn.any():
        raise ValueError("the records have drawn ids, the store's fields say none")
    _check_sums(records, fields)


def _check_sums(records: SequenceRecords, fields: RecordFields) -> None:
    totals = np.bincount(_rows(records.kept), weights=records.kept_weights, minlength=len(records)) + records.rest
    lost = (records.rest > 0) & (records.drawn == 0) & (records.kept > 0) & (not fields.tail)
    bad = ~(np.abs(totals - 1) <= SUM_TOLERANCE) | lost | ~(records.rest >= 0)
    bad |= np.isnan(records.label_log_prob) | np.isnan(records.entropy)
    if records.boundary is not None:
        bad |= np.isnan(records.boundary)
    if bad.any() or not (records.kept_weights >= 0).all():
        where = int(bad.argmax())
        raise ValueError(
            f"position {where}: probabilities sum to {totals[where]} with {records.rest[where]} outside the kept ids, "
            f"label's log-probability {records.label_log_prob[where]}, entropy {records.entropy[where]}"
        )


def _rows(per_row: Array) -> Array:
    """The position of each entry."""
    return np.arange(len(per_row)).repeat(per_row)


def _gaps(ids: Array, per_row: Array, name: str) -> Array:
    """Of ascending ids per position: the first, then how many ids lie between neighbours."""
    gaps, firsts = np.diff(ids, prepend=0) - 1, (np.cumsum(per_row) - per_row)[per_row > 0]
    gaps[firsts] = ids[firsts]
    if gaps.min(initial=0) < 0:
        raise ValueError(f"position {_rows(per_row)[gaps.argmin()]}: a {name} id occurs twice")
    return gaps


def _ids(gaps: Array, per_row: Array, fields: RecordFields) -> Array:
    """The inverse of `_gaps`."""
    if not len(gaps):
        return gaps
    steps, firsts = gaps + 1, (np.cumsum(per_row) - per_row)[per_row > 0]
    steps[firsts] -= 1
    sums = np.cumsum(steps)
    before = np.append(0, sums[firsts[1:] - 1])
    ids: Array = sums - before.repeat(per_row[per_row > 0])
    if ids.max() >= fields.vocab_size:
        raise ValueError(f"id {ids.max()} is outside the vocabulary of {fields.vocab_size}")
    return ids


def _codes(records: SequenceRecords, kept_weights: Array) -> tuple[Array, Array, Array]:
    """place [S] of the largest part (0: the rest, i: the i-th kept id), then the codes of all other parts: rests [<= S]
    and kept ids [<= N]."""
    starts = np.cumsum(records.kept + 1) - (records.kept + 1)
    parts = np.empty(len(records) + len(kept_weights), dtype=np.float64)
    is_rest = np.zeros(len(parts), dtype=bool)
    is_rest[starts] = True
    parts[starts], parts[~is_rest] = records.rest, kept_weights
    is_implied = np.zeros(len(parts), dtype=bool)
    if len(parts):
        largest = np.maximum.reduceat(parts, starts).repeat(records.kept + 1)
        found = np.flatnonzero(parts == largest)
        place = found[np.unique(_rows(records.kept + 1)[found], return_index=True)[1]] - starts  # the first of equals
        is_implied[starts + place] = True
    else:
        place = starts
    with np.errstate(divide="ignore"):
        codes = np.rint((-np.log2(parts) - 1) * STEPS) + 1
    codes = np.where(parts > 0, codes.clip(1, 65535), 0).astype(np.int64)
    return place, codes[is_rest & ~is_implied], codes[~is_rest & ~is_implied]


def _probabilities(kept: Array, place: Array, reader: Reader) -> tuple[Array, Array]:
    """rest [S] and kept weights [N], float32, from what `_codes` gave."""
    if (place > kept).any():
        raise ValueError(f"position {int((place > kept).argmax())}: the place of its largest part")
    is_kept = place > 0  # the largest part is a kept id
    largest = (np.cumsum(kept) - kept + place - 1)[is_kept]
    rest, weights = np.zeros(len(kept)), np.zeros(int(kept.sum()))
    rest[is_kept] = _PROBABILITIES.take(reader.fixed(len(largest)))
    is_stored = np.ones(len(weights), dtype=bool)
    is_stored[largest] = False
    weights[is_stored] = _PROBABILITIES.take(reader.fixed(len(weights) - len(largest)))
    left = np.maximum(1 - rest - np.bincount(_rows(kept), weights=weights, minlength=len(kept)), 0.0)
    weights[largest] = left[is_kept]
    rest[~is_kept] = left[~is_kept]
    return rest.astype(np.float32), weights.astype(np.float32)


def _half(values: Array) -> bytes:
    return np.clip(values, -65504, 65504).astype("<f2").tobytes()
