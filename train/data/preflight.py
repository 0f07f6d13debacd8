"""Checks every sample of a run before its first step, so that a bad one is not met after hours.

positions ── blocks, in worker processes ──> Collator.check ── all ranks ──> bad samples, the same list on each
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm import tqdm

from common.data.chat_template import TemplateRefusalError
from common.errors import ConfigError, DataError, DecantError
from common.shards.score_shard import ROWS_PER_GROUP
from train.data.collator import Collator
from train.data.sources import ExampleSource

# A multiple of a row group, so that each group is read by one worker, as long as no shard is shorter.
_BLOCK = 4 * ROWS_PER_GROUP


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used: its position in its source, and why."""

    position: int
    reason: str


@dataclass(frozen=True)
class Ranks:
    """This process's rank, the number of ranks, and a function that gives each rank what all ranks have, in order."""

    rank: int
    num_ranks: int
    gather: Callable[[Any], list[Any]]


def find_bad_samples(
    source: ExampleSource, collator: Collator, ranks: Ranks, *, num_workers: int, progress: bool = True
) -> list[BadSample]:
    """Checks the samples of a source; each rank takes its share, and all get the whole list.

    Raises:
        ConfigError: the chat template refuses all of them. DecantError: data cannot be read at all; on every rank.
    """
    blocks = [range(start, min(start + _BLOCK, len(source))) for start in range(0, len(source), _BLOCK)]
    own = blocks[ranks.rank :: ranks.num_ranks]
    loader = DataLoader(_Blocks(source, own, collator), batch_size=None, num_workers=num_workers)
    found: list[BadSample] = []
    num_refused = 0
    failure: DecantError | None = None
    is_shown = progress and ranks.rank == 0
    with tqdm(total=sum(map(len, own)), desc="checking", unit=" samples", disable=not is_shown) as bar:
        for block, result in zip(own, loader, strict=True):
            if isinstance(result, DecantError):
                failure = result
                break
            found += result.bad
            num_refused += result.num_refused
            bar.update(len(block))
    outcomes = ranks.gather((found, num_refused, failure))
    for _, _, failed in outcomes:
        if failed is not None:
            raise failed
    everything = sorted((bad for found, _, _ in outcomes for bad in found), key=lambda bad: bad.position)
    if everything and sum(refused for _, refused, _ in outcomes) == len(source):
        raise ConfigError(f"the chat template refuses every sample, such as: {everything[0].reason}")
    return everything


@dataclass(frozen=True)
class _BlockResult:
    bad: list[BadSample]
    num_refused: int


class _Blocks(TorchDataset["_BlockResult | DecantError"]):
    """Results of checking blocks of positions; an error that is no sample's fault is a result too."""

    def __init__(self, source: ExampleSource, blocks: list[range], collator: Collator) -> None:
        self._source = source
        self._blocks = blocks
        self._collator = collator

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> "_BlockResult | DecantError":
        bad, num_refused = [], 0
        for position in self._blocks[number]:
            try:
                self._collator.check(self._source.read_unscored(position))
            except DataError as error:
                bad.append(BadSample(position, str(error)))
                num_refused += isinstance(error, TemplateRefusalError)
            except DecantError as error:
                return error
        return _BlockResult(bad, num_refused)
