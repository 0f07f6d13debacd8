"""What must hold of one scored conversation, whoever wrote it.

Legend: R scored tokens, N kept entries of all rows, T tokens of the conversation.
"""

from collections.abc import Iterator

import numpy as np

from common.encoding import Encoded
from common.manifest import Manifest
from common.scores import TeacherScores

# A float32 softmax over 150,000 entries sums to 1 within this; the stored rest mass is computed from the entries.
_MASS_TOLERANCE = 1e-4
_REST_TOLERANCE = 1e-5
# A log-prob of a certain token may round to just above 0.
_LOGPROB_TOLERANCE = 1e-5


def token_problems(encoded: Encoded, num_images: int, manifest: Manifest) -> Iterator[str]:
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
    """At most K entries a row, each a different real token, finite, in descending order with ties by id."""
    counts_R, ids_N, logprobs_N = scores.counts, scores.ids, scores.logprobs
    vocab_size, top_k = manifest.tokenizer.vocab_size, manifest.capture.top_k
    if counts_R.size and not 0 <= counts_R.min() <= counts_R.max() <= top_k:
        yield f"rows of {counts_R.min()} to {counts_R.max()} kept entries, expected at most {top_k}"
    if ids_N.size and not 0 <= ids_N.min() <= ids_N.max() < vocab_size:
        yield f"kept ids from {ids_N.min()} to {ids_N.max()}, the tokenizer has {vocab_size}"
    if not np.isfinite(logprobs_N).all():
        yield f"{int((~np.isfinite(logprobs_N)).sum())} kept log-probs are not finite"
    if (logprobs_N > _LOGPROB_TOLERANCE).any():
        yield f"a kept log-prob of {logprobs_N.max()}, expected at most 0"
    rows_N = _rows(scores)
    if len(np.unique((rows_N << 32) | ids_N.astype(np.int64))) != len(ids_N):
        yield "a row keeps the same id twice"
    same_row = rows_N[1:] == rows_N[:-1]
    rises = (logprobs_N[1:] > logprobs_N[:-1]) | ((logprobs_N[1:] == logprobs_N[:-1]) & (ids_N[1:] < ids_N[:-1]))
    if (same_row & rises).any():
        yield f"row {rows_N[1:][same_row & rises][0]} is not in descending order"


def mass_problems(scores: TeacherScores) -> Iterator[str]:
    """Kept mass at most 1, rest mass from 0 to 1, and both adding up to 1."""
    if not np.isfinite(scores.rest_mass).all():
        yield "a rest mass is not finite"
    with np.errstate(over="ignore", invalid="ignore"):
        mass_R = np.bincount(_rows(scores), np.exp(scores.logprobs.astype(np.float64)), minlength=scores.num_rows)
        error_R = np.abs(np.clip(1.0 - mass_R, 0.0, 1.0) - scores.rest_mass)
    if (mass_R > 1.0 + _MASS_TOLERANCE).any():
        yield f"a row keeps a mass of {mass_R.max():.6f}, expected at most 1"
    if (error_R > _REST_TOLERANCE).any():
        row = int(error_R.argmax())
        yield f"row {row} keeps a mass of {mass_R[row]:.6f} and rests {scores.rest_mass[row]:.6f}, expected a sum of 1"


def own_problems(encoded: Encoded, scores: TeacherScores, logprob_sum: float) -> Iterator[str]:
    """Own log-probs finite, at most 0, equal to the kept entry of the same id or below all kept; and their sum.

    `encoded` must have passed `token_problems`, and `scores` must have a row for each of its scored tokens.
    """
    own_R, ids_R, rows_N = scores.own_logprobs, encoded.response_ids, _rows(scores)
    if not np.isfinite(own_R).all():
        yield f"{int((~np.isfinite(own_R)).sum())} own log-probs are not finite"
    if (own_R > _LOGPROB_TOLERANCE).any():
        yield f"an own log-prob of {own_R.max()}, expected at most 0"
    if not abs(scores.total_logprob - logprob_sum) <= 1e-6 * max(1.0, abs(logprob_sum)):
        yield f"logprob_sum is {logprob_sum}, its tokens' log-probs sum to {scores.total_logprob}"
    own_N = own_R[rows_N]
    same_N = scores.ids == ids_R[rows_N]
    if (np.abs(own_N - scores.logprobs) > _LOGPROB_TOLERANCE)[same_N].any():
        yield "a token's own log-prob is not that of its kept entry"
    is_kept_R = np.zeros(scores.num_rows, bool)
    is_kept_R[rows_N[same_N]] = True
    if (own_N > scores.logprobs + _LOGPROB_TOLERANCE)[~is_kept_R[rows_N]].any():
        yield "a token that is not kept has a higher log-prob than a kept one"


def _rows(scores: TeacherScores) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Row of each kept entry, int64 [N]."""
    return np.repeat(np.arange(scores.num_rows, dtype=np.int64), np.maximum(scores.counts, 0))
