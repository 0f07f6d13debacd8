"""The frozen teacher: encoded conversations in, scores of their response tokens out.

Legend: T own sequence (one placeholder an image), T' the engine's expanded sequence, R scored tokens, K kept.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs

from common.encoding import Encoded
from common.errors import ConfigError, ModelError
from common.scores import TeacherScores, from_rectangle
from precompute.engine import Engine, Prompt
from precompute.scoring import Key, ScoreRequest, ScoringPlan


class Teacher:
    """A vLLM engine that scores prompts and generates nothing that is kept."""

    def __init__(self, plan: ScoringPlan) -> None:
        """Starts the engine; see `Engine` for what it raises."""
        if plan.top_k > plan.output_vocab_size:
            raise ConfigError(
                f"top_k = {plan.top_k} exceeds the {plan.output_vocab_size} entries of the teacher's vocabulary; "
                'give "all" to keep every one'
            )
        self._plan = plan
        self._engine = Engine(
            plan.model_dir,
            plan.engine,
            # vLLM generates at least one token, for which there must be room.
            max_model_len=plan.max_tokens + 1,
            max_images=plan.max_images,
            max_logprobs=plan.top_k,
        )
        self._params = SamplingParams(
            max_tokens=1, temperature=0.0, prompt_logprobs=plan.top_k, flat_logprobs=True, detokenize=False
        )

    def score(self, requests: Iterable[ScoreRequest]) -> Iterator[tuple[Key, TeacherScores]]:
        """Scores of each request, in the order in which they finish.

        Raises:
            ModelError: the engine died, or what it returned does not fit the request.
        """
        prompts = ((request, Prompt(request.encoded.input_ids, request.images, request.where)) for request in requests)
        for request, output in self._engine.run(prompts, self._params):
            yield (
                request.key,
                to_scores(output, request.encoded, vocab_size=self._plan.vocab_size, where=request.where),
            )

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()


def to_scores(output: RequestOutput, encoded: Encoded, *, vocab_size: int, where: str) -> TeacherScores:
    """Takes the scored rows out of vLLM's prompt log-probs.

    vLLM's entry i is the distribution that token i of the expanded prompt is drawn from: the shift of
    `predicting_positions` is in it already, and row r is read at the position of scored token r itself. Its first
    value is that token's own log-prob, the others are the best K in descending order. Entries at or past
    `vocab_size` are padding of the output layer: they are left out, and so counted in the rest mass.

    Raises:
        ModelError: the engine's sequence is not the conversation's, or a score is missing or not finite.
    """
    flat = output.prompt_logprobs
    if not isinstance(flat, FlatLogprobs) or output.prompt_token_ids is None:
        raise ModelError(f"{where}: vLLM returned no prompt log-probs")
    positions_R = expanded_positions(np.asarray(output.prompt_token_ids, np.int32), encoded, where)
    if len(flat) != len(output.prompt_token_ids):
        raise ModelError(f"{where}: vLLM returned {len(flat)} rows for {len(output.prompt_token_ids)} tokens")
    runs = np.split(positions_R, np.flatnonzero(np.diff(positions_R) != 1) + 1)
    ranges = [(flat.start_indices[run[0]], flat.end_indices[run[-1]]) for run in runs]
    ids = np.concatenate([np.asarray(flat.token_ids[start:stop], np.int32) for start, stop in ranges])
    logprobs = np.concatenate([np.asarray(flat.logprobs[start:stop], np.float32) for start, stop in ranges])
    ids_RK = ids.reshape(len(positions_R), -1)
    logprobs_RK = logprobs.reshape(ids_RK.shape)
    if not np.array_equal(ids_RK[:, 0], encoded.response_ids):
        raise ModelError(f"{where}: the rows that vLLM returned are not those of the response tokens")
    own_logprobs = logprobs_RK[:, 0].copy()
    if not np.isfinite(own_logprobs).all():
        raise ModelError(
            f"{where}: the teacher gives a response token the log-prob "
            f"{own_logprobs[~np.isfinite(own_logprobs)][0]}; its weights or engine.dtype are at fault"
        )
    kept_RK = np.where(ids_RK[:, 1:] < vocab_size, logprobs_RK[:, 1:], -np.inf)
    return from_rectangle(own_logprobs, ids_RK[:, 1:], kept_RK)


def expanded_positions(expanded_ids: npt.NDArray[np.int32], encoded: Encoded, where: str) -> npt.NDArray[np.int64]:
    """Where the scored tokens stand in the engine's sequence, int64 [R].

    However many placeholders an image became, the tokens between images are the same on both sides.

    Raises:
        ModelError: they are not.
    """
    image_token_id = -1 if encoded.image_token_id is None else encoded.image_token_id
    own_text = np.flatnonzero(encoded.input_ids != image_token_id)
    expanded_text = np.flatnonzero(expanded_ids != image_token_id)
    if not np.array_equal(encoded.input_ids[own_text], expanded_ids[expanded_text]):
        raise ModelError(
            f"{where}: vLLM read {len(expanded_text)} text tokens that are not the conversation's {len(own_text)}; "
            "this model's image tokens cannot be aligned"
        )
    return expanded_text[np.searchsorted(own_text, encoded.response_positions)]
