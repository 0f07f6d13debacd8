"""What must hold of one scored conversation, whoever wrote it.

Legend: R scored tokens, N kept entries of all rows, T tokens of the conversation.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from common.data.chat_encoding import EncodedChat
from common.shards.manifest import Manifest
from common.shards.quantization import REST_ROUNDING, probability_error
from common.shards.scores import TeacherScores

# A float32 softmax over 150,000 entries sums to 1 within this; the stored rest mass is computed from the entries.
_MASS_TOLERANCE = 1e-4
_REST_TOLERANCE = 1e-5
# A log-prob of a certain token may round to just above 0.
_LOGPROB_TOLERANCE = 1e-5
# Of a sum in float64, in any order and with another machine's exp.
_SUM_TOLERANCE = 1e-9


def token_problems(encoded: EncodedChat, num_images: int, manifest: Manifest) -> Iterator[str]:
    """Ids within the vocabulary, spans inside the sequence, as many placeholders as images, within the limit."""
    ids_T, spans = encoded.input_ids, encoded.spans
    vocab_size = manifest.tokenizer.vocab_size
    if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < vocab_size:
        yield f"token ids from {ids_T.min()} to {ids_T.max()}, the tokenizer has {vocab_size}"
    if encoded.num_images != num_images:
        yield f"{encoded.num_images} image placeholders for {num_images} images"
    added = 0 if manifest.image is None else encoded.num_images * (manifest.image.tokens_per_image - 1)
    if len(ids_T) + added > manifest.capture.max_tokens:
        yield f"{len(ids_T) + added} tokens, images expanded; the limit was {manifest.capture.max_tokens}"
    edges = spans.astype(np.int64).reshape(-1)
    if not len(spans):
        yield "no scored tokens"
    elif edges[0] < 1 or edges[-1] > len(ids_T) or (spans[:, 1] <= spans[:, 0]).any() or (np.diff(edges) < 0).any():
        yield f"spans {spans.tolist()} are empty, overlap or leave the sequence of {len(ids_T)} tokens"


def kept_problems(scores: TeacherScores, manifest: Manifest) -> Iterator[str]:
    """At most as many entries a row as asked for, finite.

    That they are different tokens of the vocabulary, each drawn at least once, in the promised order, is how they are
    read.
    """
    counts_R, logprobs_N, max_kept = scores.counts, scores.logprobs, manifest.capture.max_kept
    if counts_R.size and not 0 <= counts_R.min() <= counts_R.max() <= max_kept:
        yield f"rows of {counts_R.min()} to {counts_R.max()} kept entries, expected at most {max_kept}"
    if not np.isfinite(logprobs_N).all():
        yield f"{int((~np.isfinite(logprobs_N)).sum())} kept log-probs are not finite"
    if (logprobs_N > _LOGPROB_TOLERANCE).any():
        yield f"a kept log-prob of {logprobs_N.max()}, expected at most 0"


def mass_problems(scores: TeacherScores, manifest: Manifest) -> Iterator[str]:
    """Kept mass at most 1, rest mass from 0 to 1, both adding up to 1; no row ends before or after it should."""
    rest_R = scores.rest_mass
    if not ((rest_R >= 0) & (rest_R <= 1)).all():
        yield f"rest masses from {rest_R.min()} to {rest_R.max()}, expected 0 to 1"
    with np.errstate(over="ignore", invalid="ignore"):
        if scores.draws is None:
            weights_N, total, tolerance = np.exp(scores.logprobs, dtype=np.float64), 1, _MASS_TOLERANCE
        else:
            assert manifest.capture.num_draws is not None
            # Added before the division, so that a row of all draws has a mass of exactly 1.
            weights_N, total, tolerance = scores.draws.astype(np.float64), manifest.capture.num_draws, 0.0
        mass_R = _sum(weights_N, scores) / total
        error_R = np.abs(np.clip(1.0 - mass_R, 0.0, 1.0) - scores.rest_mass)
        rounding_N = probability_error(scores, manifest.capture.coding)
        # What the best entries but the last hold at least; what all of them may be off together.
        before_last_R = mass_R - _last(weights_N + rounding_N, scores.counts) / total
        # Of a quantised row the sum is right although its terms are not.
        slack_R = _sum(rounding_N, scores) if manifest.capture.precision == "fp16" else np.zeros(scores.num_rows)
    if (mass_R > 1.0 + tolerance + slack_R).any():
        yield f"a row keeps a mass of {mass_R.max():.6f}, expected at most 1"
    if (error_R > _REST_TOLERANCE + slack_R).any():
        row = int((error_R - slack_R).argmax())
        yield f"row {row} keeps a mass of {mass_R[row]:.6f} and rests {scores.rest_mass[row]:.6f}, expected a sum of 1"
    if scores.draws is None:
        if manifest.capture.coding.levels is not None:
            slack_R = rest_R.astype(np.float64) * REST_ROUNDING
        yield from _length_problems(scores.counts, mass_R, before_last_R, slack_R, manifest)


def _length_problems(
    counts_R: npt.NDArray[np.int32],
    mass_R: npt.NDArray[np.float64],
    before_last_R: npt.NDArray[np.float64],
    slack_R: npt.NDArray[np.float64],
    manifest: Manifest,
) -> Iterator[str]:
    """Best entries: a row holds all it can, or just enough for `top_p` and `min_k`. `before_last_R`: mass but the last.

    It holds all it can with `top_k` entries, less those that were padding of the output layer (a shard does not say
    how many they were, but there cannot be more than there are), or with no mass left.
    """
    capture = manifest.capture
    num_padding = manifest.teacher.vocab_size - manifest.tokenizer.vocab_size
    # Without top_p no mass is enough.
    enough = np.inf if capture.top_p is None else capture.top_p
    slack_R = slack_R + (_SUM_TOLERANCE if capture.precision == "fp32" else _REST_TOLERANCE)
    holds_all_R = (counts_R >= capture.top_k - num_padding) | (mass_R >= 1.0 - _REST_TOLERANCE)
    short_R = ~holds_all_R & ((mass_R < enough - slack_R) | (counts_R < capture.min_k))
    long_R = (before_last_R >= enough + slack_R) & (counts_R > capture.min_k)
    for wrong_R, what in ((short_R, "few"), (long_R, "many")):
        if wrong_R.any():
            row = int(wrong_R.argmax())
            wanted = f"{capture.top_k}" if capture.top_p is None else f"{capture.top_p} in as few as hold it"
            yield (
                f"row {row} keeps too {what} entries: {counts_R[row]} with a mass of {mass_R[row]:.6f}, "
                f"expected {wanted}"
            )


def own_problems(encoded: EncodedChat, scores: TeacherScores, logprob_sum: float, manifest: Manifest) -> Iterator[str]:
    """Own log-probs finite, at most 0, equal to the kept entry of the same id or below all kept; and their sum.

    A kept log-prob that is stored with less precision leaves its own token's that much room.

    What was drawn says nothing of the own token's log-prob.

    `encoded` must have passed `token_problems`, and `scores` must have a row for each of its scored tokens.
    """
    own_R, ids_R, rows_N = scores.own_logprobs, encoded.response_ids, _rows(scores)
    if not np.isfinite(own_R).all():
        yield f"{int((~np.isfinite(own_R)).sum())} own log-probs are not finite"
    if (own_R > _LOGPROB_TOLERANCE).any():
        yield f"an own log-prob of {own_R.max()}, expected at most 0"
    if not abs(scores.total_logprob - logprob_sum) <= 1e-6 * max(1.0, abs(logprob_sum)):
        yield f"logprob_sum is {logprob_sum}, its tokens' log-probs sum to {scores.total_logprob}"
    if scores.draws is not None:
        return
    own_N = own_R[rows_N]
    same_N = scores.ids == ids_R[rows_N]
    rounding_N = probability_error(scores, manifest.capture.coding)
    with np.errstate(divide="ignore"):
        low_N, high_N = (
            np.log(np.maximum(np.exp(scores.logprobs, dtype=np.float64) + d, 0)) for d in (-rounding_N, rounding_N)
        )
    if ((own_N < low_N - _LOGPROB_TOLERANCE) | (own_N > high_N + _LOGPROB_TOLERANCE))[same_N].any():
        yield "a token's own log-prob is not that of its kept entry"
    is_kept_R = np.zeros(scores.num_rows, bool)
    is_kept_R[rows_N[same_N]] = True
    if (own_N > high_N + _LOGPROB_TOLERANCE)[~is_kept_R[rows_N]].any():
        yield "a token that is not kept has a higher log-prob than a kept one"


def _sum(values_N: npt.NDArray[np.float64], scores: TeacherScores) -> npt.NDArray[np.float64]:
    """Sum over each row's entries, float64 [R]."""
    return np.bincount(_rows(scores), values_N, minlength=scores.num_rows).astype(np.float64)


def _rows(scores: TeacherScores) -> npt.NDArray[np.int64]:
    """Row of each kept entry, int64 [N]."""
    return np.repeat(np.arange(scores.num_rows, dtype=np.int64), np.maximum(scores.counts, 0))


def _last(values_N: npt.NDArray[np.float64], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Value of each row's last entry, 0 where it has none, float64 [R]."""
    last_R = np.zeros(len(counts_R))
    last_R[counts_R > 0] = values_N[np.cumsum(np.maximum(counts_R, 0))[counts_R > 0] - 1]
    return last_R
