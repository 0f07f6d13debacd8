"""Scores of the wanted rows of prompts that the engine computes chunk by chunk.

    a PrefillChunk of each request in the step ─> score_chunks ─> RowAccumulator of each request
                                                               └> RowScores of the prompts that are finished

The engine may compute a prompt in several steps, and starts over when it has preempted it. Rows are therefore kept by
their place in the prompt, not by their order of arrival. Imports torch and numpy, but not vLLM.

Legend: T tokens of a step, H hidden size, R wanted rows of a request, D draws.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from precompute.engine.row_request import RowRequest, request_uniforms
from precompute.engine.row_scores import LogitsFunction, RowScores, score_rows


class RowAccumulator:
    """Collects the scored rows of one request over the chunks of its prefill."""

    def __init__(self, request: RowRequest) -> None:
        self.request = request
        self._uniforms_RD = request_uniforms(request)
        self._scores: RowScores | None = None
        # Rows [0, _num_done) are scored.
        self._num_done = 0

    def rows_in(self, start: int, stop: int) -> slice:
        """Returns which of the wanted rows lie in positions [start, stop) of the prompt."""
        return slice(*np.searchsorted(self.request.rows, [start, stop]).tolist())

    def uniforms(self, rows: slice) -> npt.NDArray[np.float64]:
        """Returns the random numbers of these rows, float64 [., D] in [0, 1)."""
        return self._uniforms_RD[rows]

    def add(self, rows: slice, scores: RowScores) -> None:
        """Copies in the scores of these rows, which stay on their device."""
        if self._scores is None:
            num_rows = len(self.request.rows)
            self._scores = RowScores(
                **{name: part.new_empty(num_rows, *part.shape[1:]) for name, part in vars(scores).items()}
            )
        for name, part in vars(scores).items():
            getattr(self._scores, name)[rows].copy_(part)
        # Rows after a gap do not count, because the result would hold rows that nobody computed.
        if rows.start <= self._num_done:
            self._num_done = max(self._num_done, rows.stop)

    def result(self) -> RowScores | None:
        """Returns the scores of all rows, or None if one is missing, as when a cache served its position."""
        return self._scores if self._num_done == len(self.request.rows) else None


@dataclass(frozen=True)
class PrefillChunk:
    """A request's part in a step: positions [start, stop) of its prompt, which begin at row `offset` of the batch."""

    request_id: str
    accumulator: RowAccumulator
    start: int
    stop: int
    offset: int
    is_last: bool


@dataclass(frozen=True)
class _WantedRows:
    """The wanted rows of a request that lie in its chunk; never empty."""

    chunk: PrefillChunk
    rows: slice


def score_chunks(
    chunks: Sequence[PrefillChunk],
    hidden_states: Tensor,
    compute_logits: LogitsFunction,
    *,
    to_cpu: bool,
) -> dict[str, RowScores]:
    """Scores the wanted rows of a step, those of all requests together, and adds them to the requests' accumulators.

    Args:
        chunks: one for each request that wants rows and whose prompt is in this step.
        hidden_states: [T, H], the step's batch on the engine's device.
        compute_logits: the output layer; gives None on a tensor-parallel rank that the logits are not gathered on.
        to_cpu: whether scores are copied to the host; else they stay on the device of `hidden_states`.

    Returns:
        The scores of the prompts that end in this step, by request id. Empty where there are no logits.
    """
    for group in _group_by_settings(chunks):
        if not _score_group(group, hidden_states, compute_logits, to_cpu):
            return {}
    finished = {chunk.request_id: chunk.accumulator.result() for chunk in chunks if chunk.is_last}
    return {request_id: scores for request_id, scores in finished.items() if scores is not None}


def _group_by_settings(chunks: Iterable[PrefillChunk]) -> Iterable[list[_WantedRows]]:
    """Groups requests whose rows can be scored in one call; leaves out those without a wanted row in this step."""
    groups: dict[tuple[int, int, int], list[_WantedRows]] = {}
    for chunk in chunks:
        rows = chunk.accumulator.rows_in(chunk.start, chunk.stop)
        if rows.start < rows.stop:
            request = chunk.accumulator.request
            settings = (request.vocab_size, request.top_k, request.num_draws)
            groups.setdefault(settings, []).append(_WantedRows(chunk, rows))
    return groups.values()


def _score_group(
    group: Sequence[_WantedRows], hidden_states: Tensor, compute_logits: LogitsFunction, to_cpu: bool
) -> bool:
    """Scores requests with the same settings in one call; returns False if there are no logits on this rank."""
    device = hidden_states.device
    request = group[0].chunk.accumulator.request
    places, targets, uniforms = [], [], []
    for wanted in group:
        chunk = wanted.chunk
        places.append(chunk.accumulator.request.rows[wanted.rows] - chunk.start + chunk.offset)
        targets.append(chunk.accumulator.request.targets[wanted.rows])
        uniforms.append(chunk.accumulator.uniforms(wanted.rows))
    scores = score_rows(
        hidden_states[torch.from_numpy(np.concatenate(places)).to(device)],
        torch.from_numpy(np.concatenate(targets)).to(device, torch.int64),
        compute_logits,
        vocab_size=request.vocab_size,
        top_k=request.top_k,
        uniforms_RD=torch.from_numpy(np.concatenate(uniforms)).to(device) if request.num_draws else None,
    )
    if scores is None:
        return False
    if to_cpu:
        scores = RowScores(**{name: part.cpu() for name, part in vars(scores).items()})
    edges = np.cumsum([0, *(len(part) for part in places)]).tolist()
    for wanted, start, stop in zip(group, edges[:-1], edges[1:], strict=True):
        part = RowScores(**{name: values[start:stop] for name, values in vars(scores).items()})
        wanted.chunk.accumulator.add(wanted.rows, part)
    return True
