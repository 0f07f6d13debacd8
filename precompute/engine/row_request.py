"""Records that pass between the front end and the workers: which rows a request wants, and the rows that it gets.

Legend: R wanted rows of a request, K kept entries, D draws, V the output layer's entries. Imports torch, but not vLLM.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from precompute.engine.row_scores import RowScores, draw

_KEY = "decant_rows"
_STEPS_KEY = "decant_steps"


@dataclass(frozen=True)
class RowRequest:
    """The rows of one prompt that are to be scored, and how.

    `rows` int32 [R]: positions of the expanded prompt, ascending, whose output is wanted. `targets` int32 [R]: the
    token whose own log-prob each row gives. `vocab_size` is that of the output layer, `top_k` the number of entries to
    keep. `num_draws` ids are also drawn from each row, the same ones for the same `seed`, an integer of up to 128 bits
    in hexadecimal.
    """

    rows: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    vocab_size: int
    top_k: int
    num_draws: int = 0
    seed: str = "0"

    def extra_args(self) -> dict[str, Any]:
        """Returns the request for `SamplingParams.extra_args`, which vLLM sends to its workers."""
        arrays = {"rows": self.rows.tobytes(), "targets": self.targets.tobytes()}
        return {_KEY: {**vars(self), **arrays}}

    @classmethod
    def from_sampling_params(cls, sampling_params: Any) -> "RowRequest | None":
        """Returns the row request in vLLM's sampling parameters, or None if they have none."""
        found = (getattr(sampling_params, "extra_args", None) or {}).get(_KEY)
        if found is None:
            return None
        arrays = {name: np.frombuffer(found[name], np.int32) for name in ("rows", "targets")}
        return cls(**{**found, **arrays})


@dataclass(frozen=True)
class CapturedRows:
    """Scores of a request's rows: float32 own [R], int32 ids and float32 logprobs [R, K], int32 drawn [R, D]."""

    own: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.int32]


class CapturedSamplerSteps:
    """Scores of the tokens that a request generates, from vLLM's sampler, kept as arrays.

    vLLM itself would make a Python object of each entry. A request whose `SamplingParams.extra_args` come from
    `extra_args`, and which wants vLLM's `logprobs`, gets one by `from_sampling_params`.
    """

    def __init__(self, num_draws: int, seed: str) -> None:
        self._num_draws = num_draws
        self._random = _generator(seed)
        self._parts: list[CapturedRows] = []

    @staticmethod
    def extra_args(num_draws: int = 0, seed: str = "0") -> dict[str, Any]:
        """Returns the entry of `SamplingParams.extra_args` that turns the capture of a request's steps on."""
        return {_STEPS_KEY: {"num_draws": num_draws, "seed": seed}}

    @classmethod
    def from_sampling_params(cls, sampling_params: Any) -> "CapturedSamplerSteps | None":
        """Returns an empty record, or None if the request did not turn the capture of its steps on."""
        found = (getattr(sampling_params, "extra_args", None) or {}).get(_STEPS_KEY)
        return None if found is None else cls(**found)

    def append(self, logprobs_lists: Any) -> None:
        """Adds the sampler's entries for new tokens: the own one first, then the best K in descending order."""
        ids, logprobs = (np.asarray(array) for array in logprobs_lists[:2])
        own, ids, logprobs = logprobs[:, 0].copy(), ids[:, 1:].astype(np.int32), logprobs[:, 1:].astype(np.float32)
        drawn = ids[:, :0]
        if self._num_draws:
            # The entries are the whole vocabulary, too many to keep, so ids are drawn at once.
            drawn = draw_from_distributions(ids, logprobs, self._random.random((len(ids), self._num_draws)))
            ids, logprobs = ids[:, :0], logprobs[:, :0]
        self._parts.append(CapturedRows(own, ids, logprobs, drawn))

    def rows(self) -> CapturedRows:
        """Returns the rows of all steps so far, in their order."""
        return CapturedRows(
            **{name: np.concatenate([getattr(part, name) for part in self._parts]) for name in vars(self._parts[0])}
        )


def draw_from_distributions(
    ids_RV: npt.NDArray[np.int32], logprobs_RV: npt.NDArray[np.float32], uniforms_RD: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Draws ids, int32 [R, D], from whole distributions whose entries come in any order.

    They are the ids that the engine draws from the same distributions with the same uniforms.
    """
    weights_RV = np.zeros_like(logprobs_RV)
    np.put_along_axis(weights_RV, ids_RV.astype(np.int64), np.exp(logprobs_RV), axis=1)
    drawn_RD: npt.NDArray[np.int32] = draw(torch.from_numpy(weights_RV), torch.from_numpy(uniforms_RD)).int().numpy()
    return drawn_RD


def _generator(seed: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int(seed, 16)))


def request_uniforms(request: RowRequest) -> npt.NDArray[np.float64]:
    """Returns the random numbers of a request, float64 [R, D] in [0, 1): a function of its seed alone."""
    return _generator(request.seed).random((len(request.rows), request.num_draws))


def pack_row_scores(scores: RowScores) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scores as the fields of vLLM's `LogprobsTensors`, which it sends from its workers to the front end."""
    ids = torch.cat([scores.ids, scores.drawn], dim=1)
    logprobs = torch.cat([scores.own[:, None], scores.logprobs], dim=1)
    # Sent in the field for the ranks of tokens, because these are not read here.
    top_k = torch.tensor([scores.ids.shape[1]], dtype=torch.int32)
    return ids, logprobs, top_k


def unpack_row_scores(tensors: Sequence[Tensor]) -> CapturedRows:
    """Inverts `pack_row_scores`, without a copy; fields past the third are ignored."""
    ids, logprobs, top_k = (tensor.numpy() for tensor in tensors[:3])
    k = int(top_k[0])
    return CapturedRows(own=logprobs[:, 0], ids=ids[:, :k], logprobs=logprobs[:, 1:], drawn=ids[:, k:])
