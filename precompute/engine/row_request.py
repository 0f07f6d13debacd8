"""What a request asks of the capture in the engine, and what it gets back.

Legend: R wanted rows of a request, K kept entries, D draws, V the output layer's entries.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from precompute.engine.row_scores import RowScores, draw

_KEY = "decant_rows"
_STEPS_KEY = "decant_steps"


@dataclass(frozen=True)
class RowRequest:
    """What to score of one prompt.

    `rows` int32 [R]: positions of the expanded prompt, ascending, whose output is wanted. `targets` int32 [R]: the
    token whose own log-prob each row gives. `vocab_size` is that of the output layer, `top_k` the entries to keep.
    `num_draws` ids are drawn from each row besides, the same ones for the same `seed`, an integer of up to 128 bits
    in hexadecimal.
    """

    rows: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    vocab_size: int
    top_k: int
    num_draws: int = 0
    seed: str = "0"

    def extra_args(self) -> dict[str, Any]:
        """For `SamplingParams.extra_args`, which vLLM carries to its workers."""
        arrays = {"rows": self.rows.tobytes(), "targets": self.targets.tobytes()}
        return {_KEY: {**vars(self), **arrays}}

    @classmethod
    def of(cls, sampling_params: Any) -> "RowRequest | None":
        """The wish that a request came with."""
        found = (getattr(sampling_params, "extra_args", None) or {}).get(_KEY)
        if found is None:
            return None
        arrays = {name: np.frombuffer(found[name], np.int32) for name in ("rows", "targets")}
        return cls(**{**found, **arrays})


@dataclass(frozen=True)
class CapturedRows:
    """What a request gives back: float32 own [R], int32 ids and float32 logprobs [R, K], int32 drawn [R, D]."""

    own: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    drawn: npt.NDArray[np.int32]


class CapturedSamplerSteps:
    """Scores of the tokens that a request generates, as vLLM's sampler gives them, without a Python object an entry.

    `of` makes one for a request whose `extra_args` are `ask()`; the request asks for `logprobs` as well.
    """

    def __init__(self, num_draws: int, seed: str) -> None:
        self._num_draws = num_draws
        self._random = _generator(seed)
        self._parts: list[CapturedRows] = []

    @staticmethod
    def ask(num_draws: int = 0, seed: str = "0") -> dict[str, Any]:
        """For `SamplingParams.extra_args`."""
        return {_STEPS_KEY: {"num_draws": num_draws, "seed": seed}}

    @classmethod
    def of(cls, sampling_params: Any) -> "CapturedSamplerSteps | None":
        """An empty one, if the request asks for it."""
        found = (getattr(sampling_params, "extra_args", None) or {}).get(_STEPS_KEY)
        return None if found is None else cls(**found)

    def append(self, logprobs_lists: Any) -> None:
        """Takes what the sampler gives for new tokens: the own entry first, then the best K in descending order."""
        ids, logprobs = (np.asarray(array) for array in logprobs_lists[:2])
        own, ids, logprobs = logprobs[:, 0].copy(), ids[:, 1:].astype(np.int32), logprobs[:, 1:].astype(np.float32)
        drawn = ids[:, :0]
        if self._num_draws:
            # All of the vocabulary is here, once, and goes with this call.
            drawn = draw_from_distributions(ids, logprobs, self._random.random((len(ids), self._num_draws)))
            ids, logprobs = ids[:, :0], logprobs[:, :0]
        self._parts.append(CapturedRows(own, ids, logprobs, drawn))

    def rows(self) -> CapturedRows:
        """All steps so far."""
        return CapturedRows(
            **{name: np.concatenate([getattr(part, name) for part in self._parts]) for name in vars(self._parts[0])}
        )


def draw_from_distributions(
    ids_RV: npt.NDArray[np.int32], logprobs_RV: npt.NDArray[np.float32], uniforms_RD: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Ids drawn from whole distributions whose entries come in any order, int32 [R, D]: what the engine would draw."""
    weights_RV = np.zeros_like(logprobs_RV)
    np.put_along_axis(weights_RV, ids_RV.astype(np.int64), np.exp(logprobs_RV), axis=1)
    return draw(torch.from_numpy(weights_RV), torch.from_numpy(uniforms_RD)).numpy().astype(np.int32)


def _generator(seed: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int(seed, 16)))


def request_uniforms(wish: RowRequest) -> npt.NDArray[np.float64]:
    """The random numbers of a request, float64 [R, D] in [0, 1): a function of its seed alone."""
    return _generator(wish.seed).random((len(wish.rows), wish.num_draws))


def pack_row_scores(scores: RowScores) -> Any:
    """Into the record that vLLM carries from its workers to the front end."""
    from vllm.v1.outputs import LogprobsTensors

    ids = torch.cat([scores.ids, scores.drawn], dim=1)
    logprobs = torch.cat([scores.own[:, None], scores.logprobs], dim=1)
    # Instead of ranks, which nobody asked for.
    top_k = torch.tensor([scores.ids.shape[1]], dtype=torch.int32)
    return LogprobsTensors(ids, logprobs, top_k)


def unpack_row_scores(tensors: Any) -> CapturedRows:
    """Inverse of `pack_row_scores`, without a copy."""
    ids, logprobs, top_k = (tensor.numpy() for tensor in tensors[:3])
    k = int(top_k[0])
    return CapturedRows(own=logprobs[:, 0], ids=ids[:, :k], logprobs=logprobs[:, 1:], drawn=ids[:, k:])
