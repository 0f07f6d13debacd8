"""Converts captured rows, or vLLM's own log-probs, to the scores that shards store. Does not import vLLM.

Legend: T own sequence (one placeholder an image), T' the engine's expanded sequence, R scored tokens, K kept entries,
D draws, V the output layer's entries.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from common.data.chat_encoding import EncodedChat, expand_placeholders
from common.errors import ModelError
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from precompute.engine.row_request import CapturedRows, RowRequest, draw_from_distributions, request_uniforms
from precompute.scorer import ScorerSettings

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs


# Ids that an error shows on either side of the first difference.
_SHOWN_IDS = 8


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt as the engine reads it: token ids int32 [T'], and (first position, number of tokens) of each image."""

    token_ids: npt.NDArray[np.int32]
    images: tuple[tuple[int, int], ...]


def draw_seed(seed: int, sample_id: str, conversation: int) -> str:
    """Returns the seed of all that is drawn for a conversation: 128 bits in hexadecimal, the same in every run."""
    return hashlib.sha256(f"{seed}\0{sample_id}\0{conversation}".encode()).hexdigest()[:32]


def expanded_positions(prompt: ExpandedPrompt, encoded: EncodedChat, where: str) -> npt.NDArray[np.int64]:
    """Returns the positions of the scored tokens in the engine's sequence, int64 [R].

    The text tokens of both sequences must be the same; an image may have become any tokens.

    Args:
        prompt: the conversation as the engine reads it.
        encoded: the conversation, with one placeholder an image.
        where: names the conversation in errors.

    Raises:
        ModelError: the text tokens differ, or the engine put an image elsewhere.
    """
    own_images = [prompt.token_ids[start : start + length] for start, length in prompt.images]
    if encoded.num_images != len(own_images):
        raise ModelError(f"{where}: vLLM read {len(own_images)} images, the conversation has {encoded.num_images}")
    expected = expand_placeholders(encoded.input_ids, encoded.image_token_id, own_images)
    if not np.array_equal(expected.ids, prompt.token_ids):
        raise ModelError(
            f"{where}: vLLM does not read the conversation's tokens; this model's images cannot be aligned\n"
            + show_difference("conversation", expected.ids, "vLLM", prompt.token_ids)
        )
    return expected.positions[encoded.response_positions]


def show_difference(name: str, ids: npt.NDArray[np.int32], other_name: str, others: npt.NDArray[np.int32]) -> str:
    """Returns two lines with the ids of both sequences around the first position at which they differ."""
    num_common = min(len(ids), len(others))
    differing = np.flatnonzero(ids[:num_common] != others[:num_common])
    first = int(differing[0]) if len(differing) else num_common
    shown = slice(max(0, first - _SHOWN_IDS), first + _SHOWN_IDS)
    return "\n".join(
        f"  {each}, {len(found):,} ids, from {shown.start}: {found[shown].tolist()}"
        for each, found in ((name, ids), (other_name, others))
    )


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
