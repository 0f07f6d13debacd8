"""Real text in the tokens of a real model, and that model's scores: the input of the benchmarks."""

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from precompute.engine.row_scores import RowScores, score_logits
from tests.support.real_weights import documented_members, smollm2_dir

_CONTEXT = 1024


@dataclass(frozen=True)
class RealRows:
    """Tokens `ids`, int32 [R], and the scores of each of them, on the CPU."""

    ids: npt.NDArray[np.int32]
    scores: RowScores
    vocab_size: int


def real_ids(model_dir: Path, num_tokens: int) -> npt.NDArray[np.int32]:
    """Returns the first `num_tokens` tokens of the standard library's docstrings and Python's reference manual, int32.

    Each paragraph occurs once, because repeated text takes fewer bytes in a shard than text usually does.
    """
    texts = [*(text for _, text in documented_members()), *(topics[name] for name in sorted(topics))]
    paragraphs: dict[str, str] = {}
    for paragraph in "\n\n".join(texts).split("\n\n"):
        paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    paragraphs.pop("", None)
    ids = np.asarray(AutoTokenizer.from_pretrained(model_dir)("\n\n".join(paragraphs.values()))["input_ids"], np.int32)
    assert len(ids) >= num_tokens, f"only {len(ids)} tokens of text"
    return ids[:num_tokens]


def real_rows(root: Path, num_tokens: int, top_k: int, num_draws: int = 0) -> RealRows:
    """Returns SmolLM2-135M's float32 scores of `num_tokens` tokens of real text, read in sequences of 1,024."""
    model_dir = smollm2_dir(root)
    ids = real_ids(model_dir, num_tokens + 1)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    parts = []
    for start in range(0, num_tokens, _CONTEXT):
        stop = min(start + _CONTEXT, num_tokens)
        tokens = torch.from_numpy(ids[start : stop + 1].astype(np.int64))
        with torch.inference_mode():
            logits = model(tokens[None, :-1]).logits[0]
            uniforms = torch.rand(stop - start, num_draws, dtype=torch.float64, generator=generator)
            parts.append(score_logits(logits, tokens[1:], top_k=top_k, uniforms_RD=uniforms if num_draws else None))
    names = RowScores.__dataclass_fields__
    scores = RowScores(**{name: torch.cat([getattr(part, name) for part in parts]).clone() for name in names})
    return RealRows(ids[1:], scores, int(model.config.vocab_size))
