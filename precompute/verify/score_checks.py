"""Checks of one scored conversation: tokens, kept entries, masses and own log-probs.

Legend: R scored tokens, N kept entries of all rows, T tokens of the conversation.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from common.data.chat_encoding import EncodedChat
from common.shards.manifest import Manifest
from common.shards.quantization import REST_ROUNDING, max_probability_error
from common.shards.scores import TeacherScores

# A float32 softmax over 150,000 entries sums to 1 within this; the stored rest mass is computed from the entries.
_MASS_TOLERANCE = 1e-4
_REST_TOLERANCE = 1e-5
# Rounding may put the log-prob of a certain token just above 0.
_LOGPROB_TOLERANCE = 1e-5
# A float64 sum differs by less, whatever the order of its terms and the machine's exp.
_SUM_TOLERANCE = 1e-9


def token_problems(encoded: EncodedChat, num_images: int, manifest: Manifest) -> Iterator[str]:
    """Yields ids outside the vocabulary, wrong spans or numbers of placeholders, and sequences above the limit."""
    ids_T, spans = encoded.input_ids, encoded.spans
    vocab_size = manifest.tokenizer.vocab_size
    if ids_T.size and not 0 <= ids_T.min() <= ids_T.max() < vocab_size:
        yield f"token ids from {ids_T.min()} to {ids_T.max()}, the tokenizer has {vocab_size}"
    if encoded.num_images != num_images:
        yield f"{encoded.num_images} image placeholders for {num_images} images"
    # The manifest has no number of tokens where it depends on the image.
    tokens_per_image = 1 if manifest.image is None else manifest.image.tokens_per_image or 1
    num_expanded = len(ids_T) + encoded.num_images * (tokens_per_image - 1)
    if num_expanded > manifest.capture.max_tokens:
        yield f"{num_expanded} tokens, images expanded; the limit was {manifest.capture.max_tokens}"
    edges = spans.astype(np.int64).reshape(-1)
    if not len(spans):
        yield "no scored tokens"
    elif edges[0] < 1 or edges[-1] > len(ids_T) or (spans[:, 1] <= spans[:, 0]).any() or (np.diff(edges) < 0).any():
        yield f"spans {spans.tolist()} are empty, overlap or leave the sequence of {len(ids_T)} tokens"


def kept_problems(scores: TeacherScores, manifest: Manifest) -> Iterator[str]:
    """Yields rows with more entries than were asked for, and log-probs that are not finite or above 0.

    Reading a shard already checks that a row's entries are distinct tokens of the vocabulary in the stored order, each
    drawn at least once.
    """
    counts_R, logprobs_N, max_kept = scores.counts, scores.logprobs, manifest.capture.max_kept
    if counts_R.size and not 0 <= counts_R.min() <= counts_R.max() <= max_kept:
        yield f"rows of {counts_R.min()} to {counts_R.max()} kept entries, expected at most {max_kept}"
    if not np.isfinite(logprobs_N).all():
        yield f"{int((~np.isfinite(logprobs_N)).sum())} kept log-probs are not finite"
    if (logprobs_N > _LOGPROB_TOLERANCE).any():
        yield f"a kept log-prob of {logprobs_N.max()}, expected at most 0"


def mass_problems(scores: TeacherScores, manifest: Manifest) -> Iterator[str]:
    """Yields masses outside 0 to 1 or with another sum than 1, and rows with too few or too many entries."""
    rest_R = scores.rest_mass
    if not ((rest_R >= 0) & (rest_R <= 1)).all():
        yield f"rest masses from {rest_R.min()} to {rest_R.max()}, expected 0 to 1"
    with np.errstate(over="ignore", invalid="ignore"):
        if scores.draws is None:
            weights_N, total_weight, tolerance = np.exp(scores.logprobs, dtype=np.float64), 1, _MASS_TOLERANCE
        else:
            assert manifest.capture.num_draws is not None
            # Draws are added before the division, so that a row that keeps all of them has a mass of exactly 1.
            weights_N, total_weight, tolerance = scores.draws.astype(np.float64), manifest.capture.num_draws, 0.0
        mass_R = _sum_by_row(weights_N, scores) / total_weight
        error_R = np.abs(np.clip(1.0 - mass_R, 0.0, 1.0) - scores.rest_mass)
        rounding_N = max_probability_error(scores, manifest.capture.quantizer)
        # Minimum mass of the entries before the last.
        before_last_R = mass_R - _last_of_row(weights_N + rounding_N, scores.counts) / total_weight
        # fp16 rounds each entry; quantised rows are scaled, so that their sum is right although each entry is rounded.
        slack_R = _sum_by_row(rounding_N, scores) if manifest.capture.precision == "fp16" else np.zeros(scores.num_rows)
    if (mass_R > 1.0 + tolerance + slack_R).any():
        yield f"a row keeps a mass of {mass_R.max():.6f}, expected at most 1"
    if (error_R > _REST_TOLERANCE + slack_R).any():
        row = int((error_R - slack_R).argmax())
        yield f"row {row} keeps a mass of {mass_R[row]:.6f} and rests {scores.rest_mass[row]:.6f}, expected a sum of 1"
    if scores.draws is None:
        if manifest.capture.quantizer.levels is not None:
            slack_R = rest_R.astype(np.float64) * REST_ROUNDING
        yield from _length_problems(scores.counts, mass_R, before_last_R, slack_R, manifest)


def _length_problems(
    counts_R: npt.NDArray[np.int32],
    mass_R: npt.NDArray[np.float64],
    before_last_R: npt.NDArray[np.float64],
    slack_R: npt.NDArray[np.float64],
    manifest: Manifest,
) -> Iterator[str]:
    """Yields rows that end too early or too late: a row keeps all it can, or just enough for `top_p` and `min_k`.

    A row keeps all it can if it has no mass left, or `top_k` entries. `before_last_R` is the mass without the last one.
    """
    capture = manifest.capture
    # Without top_p, no mass ends a row.
    target_mass = np.inf if capture.top_p is None else capture.top_p
    slack_R = slack_R + (_SUM_TOLERANCE if capture.precision == "fp32" else _REST_TOLERANCE)
    keeps_all_R = (counts_R >= capture.top_k) | (mass_R >= 1.0 - _REST_TOLERANCE)
    is_short_R = ~keeps_all_R & ((mass_R < target_mass - slack_R) | (counts_R < capture.min_k))
    is_long_R = (before_last_R >= target_mass + slack_R) & (counts_R > capture.min_k)
    for is_wrong_R, what in ((is_short_R, "few"), (is_long_R, "many")):
        if is_wrong_R.any():
            row = int(is_wrong_R.argmax())
            wanted = f"{capture.top_k}" if capture.top_p is None else f"{capture.top_p} in as few as hold it"
            yield (
                f"row {row} keeps too {what} entries: {counts_R[row]} with a mass of {mass_R[row]:.6f}, "
                f"expected {wanted}"
            )


def own_problems(encoded: EncodedChat, scores: TeacherScores, logprob_sum: float, manifest: Manifest) -> Iterator[str]:
    """Yields own log-probs that are not finite, above 0, or contradict the kept entries, and a wrong sum of them.

    An own log-prob equals that of the kept entry with the same id, within the precision of kept log-probs; without such
    an entry it is at most the lowest kept one. Drawn entries do not bound it.

    `encoded` must have passed `token_problems`, and `scores` must have a row for each of its scored tokens.
    """
    own_R, ids_R, rows_N = scores.own_logprobs, encoded.response_ids, _row_numbers(scores)
    if not np.isfinite(own_R).all():
        yield f"{int((~np.isfinite(own_R)).sum())} own log-probs are not finite"
    if (own_R > _LOGPROB_TOLERANCE).any():
        yield f"an own log-prob of {own_R.max()}, expected at most 0"
    if not abs(scores.total_logprob - logprob_sum) <= 1e-6 * max(1.0, abs(logprob_sum)):
        yield f"logprob_sum is {logprob_sum}, its tokens' log-probs sum to {scores.total_logprob}"
    if scores.draws is not None:
        return
    own_N = own_R[rows_N]
    is_own_N = scores.ids == ids_R[rows_N]
    rounding_N = max_probability_error(scores, manifest.capture.quantizer)
    with np.errstate(divide="ignore"):
        low_N, high_N = (
            np.log(np.maximum(np.exp(scores.logprobs, dtype=np.float64) + offset_N, 0))
            for offset_N in (-rounding_N, rounding_N)
        )
    if ((own_N < low_N - _LOGPROB_TOLERANCE) | (own_N > high_N + _LOGPROB_TOLERANCE))[is_own_N].any():
        yield "a token's own log-prob is not that of its kept entry"
    is_kept_R = np.zeros(scores.num_rows, bool)
    is_kept_R[rows_N[is_own_N]] = True
    if (own_N > high_N + _LOGPROB_TOLERANCE)[~is_kept_R[rows_N]].any():
        yield "a token that is not kept has a higher log-prob than a kept one"


def _sum_by_row(values_N: npt.NDArray[np.float64], scores: TeacherScores) -> npt.NDArray[np.float64]:
    """Returns the sum over each row's entries, float64 [R]."""
    return np.bincount(_row_numbers(scores), values_N, minlength=scores.num_rows).astype(np.float64)


def _row_numbers(scores: TeacherScores) -> npt.NDArray[np.int64]:
    """Returns the row of each kept entry, int64 [N]."""
    return np.repeat(np.arange(scores.num_rows, dtype=np.int64), np.maximum(scores.counts, 0))


def _last_of_row(values_N: npt.NDArray[np.float64], counts_R: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Returns the value of each row's last entry, 0 where it has none, float64 [R]."""
    last_R = np.zeros(len(counts_R))
    last_R[counts_R > 0] = values_N[np.cumsum(np.maximum(counts_R, 0))[counts_R > 0] - 1]
    return last_R
