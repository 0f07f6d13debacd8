"""How kept entries become bytes, and back; docs/shard-format.md says it to the bit.

    ids ─ TokenOrder ─> ranks, ascending in a row ─> differences ─> a symbol each, and what does not fit into it
    log-probs ─ precision ─> codes or float bits, in the order of the ranks ─> byte planes
    draws ──────────────────────────────────── in the order of the ranks ─> byte planes

Ids are exact. A rank is an id's place among the shard's ids by how often they are kept: what a row keeps are mostly
frequent words, so their ranks lie close together and differ by little. Each stream is a Parquet column of its own:
zstd then sees bytes of one kind.

Legend: R scored tokens, N kept entries of all of them, K kept entries of the longest row, V vocabulary.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import zstandard

from common.errors import ShardError
from common.scores import MAX_VOCAB_SIZE, TeacherScores, descending_keys, from_descending_keys, share_logprobs

Precision = Literal["fp32", "fp16", "q8", "q6"]

# How log-probs are stored; None where entries were drawn, of which the numbers of draws are.
Form = Precision | None

ID_COLUMNS = ("topk_ids", "topk_ids_low", "topk_ids_high")
_VALUE_COLUMNS: dict[Form, tuple[str, ...]] = {
    "fp32": tuple(f"topk_logprobs_{plane}" for plane in range(4)),
    "fp16": ("topk_logprobs_0", "topk_logprobs_1"),
    "q8": ("topk_roots",),
    "q6": ("topk_roots",),
    None: ("topk_draws_0", "topk_draws_1"),
}

# A code counts steps of sqrt(p), of which there are so many from 0 to 1.
LEVELS: dict[Form, int] = {"q8": 255, "q6": 63}
# p of a code in sixteenths of a squared step: its square, but code 0 stands for a quarter of a step.
_WEIGHTS = np.maximum(16 * np.arange(256) ** 2, 1).astype(np.float32)
# What a kept mass is taken for that float32 rounds to 0: half the distance from 1 to the float32 below it.
_LEAST_MASS = 2.0**-25

_VALUE_BYTES: dict[Form, int] = {form: len(names) for form, names in _VALUE_COLUMNS.items()}
_ID_BITS = (MAX_VOCAB_SIZE - 1).bit_length()

# Differences below this are their own symbols; above, symbol 192 + h stands for 192 + 256 h + a low byte.
_LITERALS = 192
_MOST_H = 63

# Conversations are coded together until they have so many entries: few calls, and arrays that stay in the cache.
_BATCH_ENTRIES = 1 << 17


@dataclass(frozen=True)
class Packed:
    """A binary column: `data` uint8 [bytes]; conversation i has those from `offsets[i]` to `offsets[i + 1]`."""

    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    def part(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes of the conversations from `start` to `stop`."""
        return self.data[self.offsets[start] : self.offsets[stop]]


class TokenOrder:
    """Token ids by falling class of frequency, ties by ascending id.

    `classes` uint8 [V]: binary digits of the number of rows that keep the id. `ids` int32 [V] by rank, `ranks` int32
    [V] by id.
    """

    def __init__(self, classes: npt.NDArray[np.uint8]) -> None:
        self.classes = classes
        self.ids = np.argsort(~classes, kind="stable").astype(np.int32)
        self.ranks = np.empty_like(self.ids)
        self.ranks[self.ids] = np.arange(len(classes), dtype=np.int32)

    @classmethod
    def of(cls, scores: Sequence[TeacherScores], vocab_size: int) -> "TokenOrder":
        """The order by these scores' own frequencies."""
        counts_V = np.zeros(vocab_size, np.int64)
        for each in scores:
            counts_V += np.bincount(each.ids, minlength=vocab_size)
        return cls(np.frexp(counts_V)[1].astype(np.uint8))

    def to_text(self) -> str:
        """Base64 of the zstd frame of `classes`; the frame has a checksum."""
        return base64.b64encode(
            zstandard.ZstdCompressor(9, write_checksum=True).compress(self.classes.tobytes())
        ).decode()

    @classmethod
    def from_text(cls, text: bytes, vocab_size: int, where: str) -> "TokenOrder":
        """Inverse of `to_text`.

        Raises:
            ShardError: damaged, or of another vocabulary.
        """
        try:
            data = zstandard.ZstdDecompressor().decompress(base64.b64decode(text, validate=True), vocab_size)
        except (ValueError, zstandard.ZstdError) as error:
            raise ShardError(f"{where}: its token classes cannot be read ({error}); the file is damaged") from error
        if len(data) != vocab_size:
            raise ShardError(f"{where}: has classes of {len(data):,} tokens, expected {vocab_size:,}")
        return cls(np.frombuffer(data, np.uint8))


def columns_of(form: Form) -> tuple[str, ...]:
    """Names of a conversation's binary columns."""
    return ID_COLUMNS + _VALUE_COLUMNS[form]


def probability_error(scores: TeacherScores, form: Form) -> npt.NDArray[np.float64]:
    """How far the probability of each kept entry as it is read may be from that written, float64 [N].

    fp32 and draws are exact. fp16 rounds log-probs to 11 significant bits. q8 and q6 round u = sqrt(p) to a root
    within half a step of it, then scale a row's roots by one factor so that the kept mass m = sum u^2 is right; with
    a = step sum(u) / m and b = K step^2 / (4 m) that factor is between (-a + sqrt(a^2 + 4 (1 - b))) / 2 and
    (a + sqrt(a^2 + 4 (1 + b))) / 2, which follows from |sum w^2 - sum r^2| <= sum |w - r| (w + r).
    """
    logprobs_N = scores.logprobs.astype(np.float64)
    probs_N = np.exp(logprobs_N)
    if form == "fp16":
        return probs_N * np.expm1(np.maximum(np.abs(logprobs_N) * 2.0**-11, 2.0**-25))
    if form not in LEVELS:
        return np.zeros_like(probs_N)
    step = 1 / LEVELS[form]
    roots_N = np.sqrt(probs_N)
    mass_R = np.maximum(_sums(probs_N, scores.counts), _LEAST_MASS)
    a_R = step * _sums(roots_N, scores.counts) / mass_R
    b_R = scores.counts * step**2 / (4 * mass_R)
    most_R = (a_R + np.sqrt(a_R**2 + 4 * (1 + b_R))) / 2 - 1
    least_R = 1 - np.maximum(-a_R + np.sqrt(np.maximum(a_R**2 + 4 * (1 - b_R), 0)), 0) / 2
    error_N = step / 2 + roots_N * np.repeat(np.maximum(most_R, least_R), scores.counts)
    # The last term: what the kept mass itself may be off, float32 as the rest is.
    return error_N * (2 * roots_N + error_N) + 2.0**-24


def _sums(values_N: npt.NDArray[np.float64], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    rows_N = np.repeat(np.arange(len(counts_R)), counts_R)
    return np.bincount(rows_N, values_N, minlength=len(counts_R)).astype(np.float64)


def pack(scores: Sequence[TeacherScores], order: TokenOrder, form: Form) -> dict[str, Packed]:
    """The binary columns of these conversations."""
    sizes = [len(each.ids) for each in scores]
    batches = [_pack_batch(scores[start:stop], order, form) for start, stop in _batches(sizes)]
    packed = {}
    for name in columns_of(form):
        lengths = np.concatenate([np.zeros(1, np.int64), *(batch[name][1] for batch in batches)])
        data = np.concatenate([np.zeros(0, np.uint8), *(batch[name][0] for batch in batches)])
        packed[name] = Packed(data, np.cumsum(lengths))
    return packed


def unpack(
    columns: Mapping[str, Packed],
    counts: Sequence[npt.NDArray[np.int32]],
    rest_mass: Sequence[npt.NDArray[np.float32]],
    order: TokenOrder,
    form: Form,
    num_draws: int | None,
    where: str,
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]]:
    """Ids, log-probs and draws of each conversation, in the order of `TeacherScores`; each array owns its memory.

    `counts` and `rest_mass` have [R] of each conversation; `num_draws` is None unless entries were drawn.

    Raises:
        ShardError: the streams do not fit together, or name a token past the vocabulary.
    """
    sizes = [int(each.sum()) for each in counts]
    for start, stop in _batches(sizes):
        counts_R, rest_R = np.concatenate(counts[start:stop]), np.concatenate(rest_mass[start:stop])
        parts = {name: column.part(start, stop) for name, column in columns.items()}
        if counts_R.min(initial=0) < 0:
            raise ShardError(f"{where}: a row keeps {counts_R.min()} entries; the shard is damaged")
        ids_N, logprobs_N, draws_N = _unpack_batch(parts, counts_R, rest_R, order, form, num_draws, where)
        last = 0
        for size in sizes[start:stop]:
            part = slice(last, last := last + size)
            yield ids_N[part].copy(), logprobs_N[part].copy(), None if draws_N is None else draws_N[part].copy()


def _pack_batch(
    scores: Sequence[TeacherScores], order: TokenOrder, form: Form
) -> dict[str, tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]:
    """Bytes of each column, and how many of them each conversation has."""
    counts_R = np.concatenate([each.counts for each in scores])
    ends = np.cumsum([0, *(len(each.ids) for each in scores)])
    num_bytes = _VALUE_BYTES[form]
    keys_N = order.ranks[np.concatenate([each.ids for each in scores])].astype(_key_type(form))
    keys_N <<= 8 * num_bytes
    keys_N |= np.concatenate([_values(each, form) for each in scores])
    keys_RK = _rows(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK.sort(axis=1)
    ranks_RK = (keys_RK >> 8 * num_bytes).astype(np.int32)
    steps_N = _entries(np.diff(ranks_RK, axis=1, prepend=np.int32(-1)), counts_R) - 1
    assert steps_N.min(initial=0) >= 0, "a row keeps an id twice"

    far = np.flatnonzero(steps_N >= _LITERALS)
    beyond = steps_N[far] - _LITERALS
    h = beyond >> 8
    high = np.flatnonzero(h >= _MOST_H)
    symbols_N = steps_N.astype(np.uint8)
    symbols_N[far] = _LITERALS + np.minimum(h, _MOST_H)
    far_ends = np.searchsorted(far, ends)
    high_ends = np.searchsorted(high, far_ends)
    streams = [
        (symbols_N, np.diff(ends)),
        (beyond.astype(np.uint8), np.diff(far_ends)),
        (h[high].astype("<u2").view(np.uint8), 2 * np.diff(high_ends)),
    ]
    values_N = _entries(keys_RK, counts_R)
    streams += [((values_N >> 8 * plane).astype(np.uint8), np.diff(ends)) for plane in range(num_bytes)]
    return dict(zip(columns_of(form), streams, strict=True))


def _unpack_batch(
    columns: Mapping[str, npt.NDArray[np.uint8]],
    counts_R: npt.NDArray[np.int32],
    rest_R: npt.NDArray[np.float32],
    order: TokenOrder,
    form: Form,
    num_draws: int | None,
    where: str,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32] | None]:
    """Ids, log-probs and draws [N] of all rows, each row by descending log-prob, ties by ascending id."""
    symbols_N, low, high, *planes = (columns[name] for name in columns_of(form))
    far = np.flatnonzero(symbols_N >= _LITERALS)
    h = symbols_N[far].astype(np.int32) - _LITERALS
    is_high = h == _MOST_H
    found = [len(symbols_N), len(low), len(high), *map(len, planes)]
    num_entries = int(counts_R.sum())
    expected = [num_entries, len(far), 2 * int(is_high.sum()), *[num_entries] * len(planes)]
    if found != expected:
        raise ShardError(
            f"{where}: streams of {found} bytes for {num_entries:,} kept entries, expected {expected}; the shard is "
            "damaged"
        )
    h[is_high] = np.frombuffer(high.tobytes(), "<u2")
    steps_N = symbols_N.astype(np.int32)
    steps_N[far] = _LITERALS + (h << 8) + low
    # Damaged steps may add up to more than 32 bits hold.
    steps_N = np.minimum(steps_N, MAX_VOCAB_SIZE) + 1
    width = int(counts_R.max(initial=0))
    wide_enough = np.int32 if width * (MAX_VOCAB_SIZE + 1) < 2**31 else np.int64
    ranks_RK = np.cumsum(_rows(steps_N, counts_R, 0), axis=1, dtype=wide_enough) - 1
    if ranks_RK.max(initial=0) >= len(order.ids):
        raise ShardError(
            f"{where}: names the token of rank {ranks_RK.max():,}, there are {len(order.ids):,}; the shard is damaged"
        )

    keys_N = _sort_keys(planes, form, num_draws, where)
    keys_N <<= _ID_BITS
    keys_RK = _rows(keys_N, counts_R, np.iinfo(keys_N.dtype).max)
    keys_RK |= order.ids[ranks_RK].astype(keys_N.dtype)
    keys_RK.sort(axis=1)
    keys_N = _entries(keys_RK, counts_R)
    ids_N = (keys_N & ((1 << _ID_BITS) - 1)).astype(np.int32)
    keys_N >>= _ID_BITS
    if form in ("fp32", "fp16"):
        return ids_N, from_descending_keys(keys_N.astype(np.uint32)), None
    if form is None:
        assert num_draws is not None
        draws_N = num_draws - keys_N.astype(np.int32)
        return ids_N, share_logprobs(draws_N, num_draws), draws_N
    weights = _WEIGHTS[LEVELS[form] :: -1]
    # Integers below 2^24, and so are their sums: float32 is exact.
    sums_R = _rows(weights[keys_N], counts_R, 0).sum(axis=1).astype(np.float64)
    mass_R = np.maximum(1.0 - rest_R.astype(np.float64), _LEAST_MASS)
    scale_R = np.log(mass_R) - np.log(np.maximum(sums_R, 1))
    logprobs_N = np.log(weights.astype(np.float64)).astype(np.float32)[keys_N]
    logprobs_N += np.repeat(scale_R.astype(np.float32), counts_R)
    # A row's one entry of probability 1 may be rounded to just above 0.
    return ids_N, np.minimum(logprobs_N, np.float32(0), out=logprobs_N), None


def _sort_keys(
    planes: Sequence[npt.NDArray[np.uint8]], form: Form, num_draws: int | None, where: str
) -> npt.NDArray[np.unsignedinteger]:
    """Integers that ascend as values descend: keys of floats, or what a code or a number of draws lacks to the highest.

    Raises:
        ShardError: a value above the highest.
    """
    values_N = planes[0].astype(_key_type(form))
    for plane, data in enumerate(planes[1:], 1):
        values_N |= data.astype(values_N.dtype) << 8 * plane
    if form == "fp32":
        return descending_keys(values_N.astype(np.uint32).view(np.float32)).astype(values_N.dtype)
    if form == "fp16":
        return descending_keys(values_N.astype(np.uint16).view(np.float16).astype(np.float32)).astype(values_N.dtype)
    highest = num_draws if form is None else LEVELS[form]
    assert highest is not None
    if values_N.max(initial=0) > highest:
        raise ShardError(f"{where}: a value of {values_N.max()}, expected at most {highest}; the shard is damaged")
    return np.subtract(highest, values_N, out=values_N)


def _values(scores: TeacherScores, form: Form) -> npt.NDArray[np.uint32]:
    """Numbers of draws, bits of the float, or nearest steps of sqrt(p), in the order of the entries."""
    if form is None:
        assert scores.draws is not None
        return scores.draws.astype(np.uint32)
    if form == "fp32":
        return scores.logprobs.view(np.uint32)
    if form == "fp16":
        return scores.logprobs.astype(np.float16).view(np.uint16).astype(np.uint32)
    assert np.isfinite(scores.logprobs).all()
    levels = np.float32(LEVELS[form])
    roots_N = np.exp(scores.logprobs * np.float32(0.5))
    return np.minimum(np.rint(roots_N * levels), levels).astype(np.uint32)


def _key_type(form: Form) -> type[np.unsignedinteger]:
    """Holds an id or rank beside a value; sorting the narrower is twice as fast."""
    return np.uint32 if form in LEVELS else np.uint64


def _batches(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of neighbours with up to `_BATCH_ENTRIES` entries together, or of one that has more."""
    start, total = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and total + size > _BATCH_ENTRIES:
            yield start, stop
            start, total = stop, 0
        total += size
    if sizes:
        yield start, len(sizes)


def _rows(values_N: npt.NDArray[Any], counts_R: npt.NDArray[np.int32], fill: int) -> npt.NDArray[Any]:
    """Entries as a rectangle [R, K], `fill` after the last of a row. A view if all rows are equally long."""
    width = int(counts_R.max(initial=0))
    if len(values_N) == width * len(counts_R):
        return values_N.reshape(len(counts_R), width)
    rows_RK = np.full((len(counts_R), width), fill, values_N.dtype)
    rows_RK[np.arange(width) < counts_R[:, None]] = values_N
    return rows_RK


def _entries(rows_RK: npt.NDArray[Any], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    """Inverse of `_rows`."""
    width = rows_RK.shape[1]
    return rows_RK.reshape(-1) if counts_R.sum() == rows_RK.size else rows_RK[np.arange(width) < counts_R[:, None]]
