"""Token ids by how often they are kept, the order in which shards store them."""

import base64
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import zstandard

from common.errors import ShardError
from common.scores import TeacherScores


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
