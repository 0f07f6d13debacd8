"""Converts captured rows, or vLLM's own log-probs, to the scores that shards store. Does not import vLLM.

Legend: T own sequence (one placeholder an image), T' the engine's expanded sequence, R scored tokens, K kept entries,
D draws, V the output layer's entries.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.data.chat_encoding import EncodedChat
from common.errors import ModelError
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from precompute.engine.row_request import CapturedRows, RowRequest, draw_from_distributions, request_uniforms
from precompute.scorer import ScorerSettings

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


def draw_seed(seed: int, sample_id: str, conversation: int) -> str:
    """Returns the seed of all that is drawn for a conversation: 128 bits in hexadecimal, the same in every run."""
    return hashlib.sha256(f"{seed}\0{sample_id}\0{conversation}".encode()).hexdigest()[:32]


def expanded_positions(expanded_ids: npt.NDArray[np.int32], encoded: EncodedChat, where: str) -> npt.NDArray[np.int64]:
    """Returns the positions of the scored tokens in the engine's sequence, int64 [R].

    The text tokens of both sequences must be the same; an image may have become any number of placeholders.

    Args:
        expanded_ids: int32 [T'], the prompt as the engine reads it.
        encoded: the conversation, with one placeholder an image.
        where: names the conversation in errors.

    Raises:
        ModelError: the text tokens differ.
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


def rows_from_flat_logprobs(
    flat: "FlatLogprobs", request: RowRequest, places_R: npt.NDArray[np.int32], where: str
) -> CapturedRows:
    """Takes the wanted rows out of vLLM's own log-probs, where they stand at `places_R`, ascending.

    A row's first entry is the log-prob of the token that stands there; the others are the best ones in descending
    order. Where ids are to be drawn, the others are the whole vocabulary, and the same ids are drawn as in the engine.

    Raises:
        ModelError: the rows are not those of the response tokens.
    """
    if len(flat) <= places_R[-1]:
        raise ModelError(f"{where}: vLLM returned {len(flat)} rows, row {places_R[-1]} is wanted")
    runs = np.split(places_R, np.flatnonzero(np.diff(places_R) != 1) + 1)
    ranges = [(flat.start_indices[run[0]], flat.end_indices[run[-1]]) for run in runs]
    ids = np.concatenate([np.asarray(flat.token_ids[start:stop], np.int32) for start, stop in ranges])
    logprobs = np.concatenate([np.asarray(flat.logprobs[start:stop], np.float32) for start, stop in ranges])
    ids_RK = ids.reshape(len(places_R), -1)
    logprobs_RK = logprobs.reshape(ids_RK.shape)
    if not np.array_equal(ids_RK[:, 0], request.targets):
        raise ModelError(f"{where}: the rows that vLLM returned are not those of the response tokens")
    own_R, ids_RK, logprobs_RK = logprobs_RK[:, 0].copy(), ids_RK[:, 1:], logprobs_RK[:, 1:]
    if not request.num_draws:
        return CapturedRows(own_R, ids_RK, logprobs_RK, ids_RK[:, :0])
    drawn_RD = draw_from_distributions(ids_RK, logprobs_RK, request_uniforms(request))
    return CapturedRows(own_R, ids_RK[:, :0], logprobs_RK[:, :0], drawn_RD)


def scores_from_rows(rows: CapturedRows, settings: ScorerSettings, where: str) -> TeacherScores:
    """Returns what the engine captured in the form in which it is stored.

    Raises:
        ModelError: an own log-prob is not finite, or padding of the output layer, ids at or past the tokenizer's size,
            has probability.
    """
    if not np.isfinite(rows.own).all():
        raise ModelError(
            f"{where}: the teacher gives a response token the log-prob "
            f"{rows.own[~np.isfinite(rows.own)][0]}; its weights or engine.dtype are at fault"
        )
    is_padding_RK = rows.ids >= settings.vocab_size
    if np.isfinite(rows.logprobs[is_padding_RK]).any() or (rows.drawn >= settings.vocab_size).any():
        raise ModelError(
            f"{where}: vLLM gives padding rows of the output layer, from {settings.vocab_size} on, a probability; its "
            "model does not take its logits from compute_logits"
        )
    if settings.num_draws:
        return scores_from_draws(rows.own, rows.drawn)
    return scores_from_topk(rows.own, rows.ids, rows.logprobs, top_p=settings.top_p, min_k=settings.min_k)
