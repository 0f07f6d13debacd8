"""View of one sample: its messages, and each scored token with the teacher's best alternatives.

Legend: R scored tokens, K kept entries of one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.data.chat_encoding import EncodedChat, load_tokenizer, tokenizer_sha256
from common.data.samples import ImageRef, Turn
from common.errors import ProvenanceError
from common.shards.manifest import Manifest
from common.shards.score_shard import PREFIXES, ScoredConversation, ShardRow
from precompute.inspection.statistics import entropies

# The text of a token, given its id.
TokenText = Callable[[int], str]


@dataclass(frozen=True)
class Alternative:
    """A kept entry of a scored token; it was drawn `draws` times, None where best entries are kept."""

    token_id: int
    text: str
    probability: float
    draws: int | None


@dataclass(frozen=True)
class Token:
    """A scored token; `rank` is its position among the kept entries, counted from 1, None if it is not kept."""

    position: int
    token_id: int
    text: str
    own_logprob: float
    entropy: float
    rest_mass: float
    num_kept: int
    rank: int | None
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class Conversation:
    """A conversation with its first scored tokens, one tuple for each span of `spans`; `num_scored` counts all of them.

    `name` is `chosen` or `rejected` in a preference pair, empty otherwise.
    """

    name: str
    turns: tuple[Turn, ...]
    num_tokens: int
    num_scored: int
    spans: tuple[tuple[Token, ...], ...]

    @property
    def num_shown(self) -> int:
        """Number of scored tokens in `spans`."""
        return sum(map(len, self.spans))


@dataclass(frozen=True)
class SampleView:
    """One row of a shard."""

    sample_id: str
    index: int
    shard: int
    images: tuple[ImageRef, ...]
    conversations: tuple[Conversation, ...]


def make_sample_view(
    row: ShardRow, shard: int, token_text: TokenText, *, num_alternatives: int, max_tokens: int
) -> SampleView:
    """Returns the first `max_tokens` scored tokens of each conversation, each with its best `num_alternatives` entries.

    Args:
        row: a row of a shard.
        shard: the number of that shard.
        token_text: gives the text of a token id.
        num_alternatives: maximum number of kept entries of a token.
        max_tokens: maximum number of scored tokens of a conversation.
    """
    conversations = []
    for prefix, turns, scored in zip(
        PREFIXES[row.sample.kind], row.sample.conversations, row.conversations, strict=True
    ):
        tokens = _scored_tokens(scored, token_text, num_alternatives, max_tokens)
        conversations.append(
            Conversation(
                name=prefix.rstrip("_"),
                turns=turns,
                num_tokens=len(scored.encoded.input_ids),
                num_scored=scored.scores.num_rows,
                spans=_split_by_span(tokens, scored.encoded),
            )
        )
    return SampleView(
        sample_id=row.sample.id,
        index=row.index,
        shard=shard,
        images=row.sample.images,
        conversations=tuple(conversations),
    )


def load_token_text(directory: Path, manifest: Manifest) -> TokenText:
    """Loads the tokenizer of a local model directory, which must be that of the shards, to get the texts of tokens.

    Raises:
        ModelError: there is no fast tokenizer, or transformers is not installed.
        ProvenanceError: it is another tokenizer.
    """
    tokenizer = load_tokenizer(directory)
    found = tokenizer_sha256(tokenizer)
    if found != manifest.tokenizer.sha256:
        raise ProvenanceError(
            f"{directory}: its tokenizer has SHA-256 {found}, the shards were made with {manifest.tokenizer.sha256}; "
            "its texts would be wrong. Give the teacher's directory, or leave --tokenizer out to see token ids"
        )

    def text(token_id: int) -> str:
        piece = tokenizer.convert_ids_to_tokens(token_id)
        # A SentencePiece token that is decoded alone loses the space before it.
        if piece is not None and piece.startswith("\u2581"):
            return str(piece).replace("\u2581", " ")
        decoded: str = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        # Part of a character in UTF-8, or an id without a token, has no text.
        return f"⟨{token_id}⟩" if not decoded or "\ufffd" in decoded else decoded

    return text


def _scored_tokens(
    scored: ScoredConversation, token_text: TokenText, num_alternatives: int, max_tokens: int
) -> list[Token]:
    """Returns the first `max_tokens` scored tokens with their scores."""
    encoded, scores = scored.encoded, scored.scores
    entropy_R = entropies(scores)
    starts_R = np.cumsum(scores.counts) - scores.counts
    tokens = []
    for row, position in enumerate(encoded.response_positions[:max_tokens]):
        start, count = int(starts_R[row]), int(scores.counts[row])
        ids_K = scores.ids[start : start + count]
        token_id = int(encoded.input_ids[position])
        ranks = np.flatnonzero(ids_K == token_id)
        alternatives = [
            Alternative(
                token_id=int(scores.ids[i]),
                text=token_text(int(scores.ids[i])),
                probability=float(np.exp(scores.logprobs[i], dtype=np.float64)),
                draws=None if scores.draws is None else int(scores.draws[i]),
            )
            for i in range(start, start + min(count, num_alternatives))
        ]
        tokens.append(
            Token(
                position=int(position),
                token_id=token_id,
                text=token_text(token_id),
                own_logprob=float(scores.own_logprobs[row]),
                entropy=float(entropy_R[row]),
                rest_mass=float(scores.rest_mass[row]),
                num_kept=count,
                rank=int(ranks[0]) + 1 if ranks.size else None,
                alternatives=tuple(alternatives),
            )
        )
    return tokens


def _split_by_span(tokens: list[Token], encoded: EncodedChat) -> tuple[tuple[Token, ...], ...]:
    """Groups the first tokens of a conversation by its scored spans; leaves out spans without a token."""
    spans, first = [], 0
    for span_start, span_stop in encoded.spans:
        stop = first + int(span_stop - span_start)
        spans.append(tuple(tokens[first:stop]))
        first = stop
    return tuple(filter(None, spans))
