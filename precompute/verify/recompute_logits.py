"""Scores random rows with transformers in float32 and compares (`verify-shards --recompute`).

Legend: R scored tokens, K kept entries, V the model's vocabulary, T' expanded sequence.

The stored distribution p is compared with the recomputed one q over the kept entries and one bucket for the rest:
KL(p || q) = sum_k p_k (ln p_k - ln q_k) + p_rest (ln p_rest - ln q_rest).
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType
from rich.table import Table
from tqdm import tqdm

from common.data.images import ImageRoot, image_root_of
from common.errors import DataError, ProvenanceError
from common.shards.manifest import Manifest, list_differences, published_shards, read_manifest, read_receipt, shard_path
from common.shards.score_shard import ShardFile, ShardRow
from common.shards.scores import TeacherScores
from common.storage.files import Location, parse_location, read_bytes
from precompute.fingerprints import read_teacher_identity
from precompute.reference_teacher import TOLERANCE, ReferenceTeacher

# A kept entry whose square root is rounded by half a step adds up to this many squared steps to its row's KL:
# p ln(p / q) - p + q has its maximum of 0.57 squared steps where a root of 1.5 steps is stored as 1.
_STEPS_OF_KL = 0.6


@dataclass(frozen=True)
class RecomputedLogits:
    """Comparison of stored with recomputed scores; KL and top-1 agreement are None where no best entries are kept."""

    num_rows: int
    num_scored_tokens: int
    mean_kl: float | None
    max_kl: float | None
    top1_agreement: float | None
    mean_own_difference: float
    max_own_difference: float
    tolerance: float
    kl_tolerance: float

    @property
    def ok(self) -> bool:
        """True if no own log-prob and no KL exceeds its tolerance or is not a number."""
        return self.max_own_difference <= self.tolerance and (self.max_kl is None or self.max_kl <= self.kl_tolerance)

    def to_json(self) -> str:
        """Returns the result as one JSON object."""
        return json.dumps(asdict(self) | {"ok": self.ok}, indent=1)

    def render(self) -> RenderableType:
        """Returns the result as a table."""
        table = Table(
            title=f"{self.num_rows} rows, {self.num_scored_tokens:,} tokens scored again in float32",
            title_justify="left",
        )
        table.add_column("measure")
        table.add_column("found", justify="right")
        table.add_column("at most", justify="right")
        own_style = "" if self.max_own_difference <= self.tolerance else "red"
        table.add_row("own log-prob, mean difference", f"{self.mean_own_difference:.2e}", "")
        table.add_row(
            "own log-prob, largest difference", f"{self.max_own_difference:.2e}", f"{self.tolerance}", style=own_style
        )
        if self.max_kl is not None:
            kl_style = "" if self.max_kl <= self.kl_tolerance else "red"
            table.add_row("KL(stored || recomputed), mean", f"{self.mean_kl:.2e}", "")
            table.add_row(
                "KL(stored || recomputed), largest", f"{self.max_kl:.2e}", f"{self.kl_tolerance:.2g}", style=kl_style
            )
            table.add_row("top-1 agreement", f"{self.top1_agreement:.2%}", "")
        return table


def recompute_logits(  # noqa: PLR0913 - its arguments are the options of verify-shards --recompute
    output: Location,
    teacher_dir: Path,
    num_rows: int,
    *,
    image_root: ImageRoot | None = None,
    seed: int = 0,
    progress: bool = True,
) -> RecomputedLogits:
    """Scores `num_rows` random rows and compares with the stored scores.

    `image_root` defaults to the one in the output's config.json.

    Raises:
        ProvenanceError: `teacher_dir` is not the teacher of this output, or processes images differently.
        ShardError: the output is damaged.
        DataError: an image is gone.
    """
    manifest = read_manifest(output)
    teacher = read_teacher_identity(teacher_dir)
    if differences := list_differences(manifest.teacher.model_dump(), teacher.model_dump()):
        raise ProvenanceError(
            f"{teacher_dir}: is not the teacher of {output}\n" + "\n".join(f"  {line}" for line in differences)
        )
    reference = ReferenceTeacher(teacher_dir, manifest.tokenizer.vocab_size)
    identity = manifest.image
    if identity is not None and reference.images is not None and reference.images.sha256 != identity.processor_sha256:
        raise ProvenanceError(f"{teacher_dir}: its image processor has other settings than the teacher's had")
    root = image_root or _configured_image_root(output)
    own_differences, kl, is_top1 = [], [], []
    chosen = _draw_rows(output, manifest, num_rows, seed)
    num_compared = 0
    for row in tqdm(chosen, total=num_rows, desc="recomputing", unit=" rows", disable=not progress):
        num_compared += 1
        images = [] if identity is None else reference.load_images(row.sample, root, identity.aspect_ratio)
        for stored in row.conversations:
            logprobs_RV = reference.logprobs(stored.encoded, images)
            ids_R = stored.encoded.response_ids
            own_differences.append(np.abs(stored.scores.own_logprobs - logprobs_RV[np.arange(len(ids_R)), ids_R]))
            if manifest.capture.top_k:
                kl.append(bucketed_kl(stored.scores, logprobs_RV))
                best_R = logprobs_RV.argmax(axis=1)
                is_top1.append(stored.scores.topk()[0][:, 0] == best_R)
    if not own_differences:
        raise DataError(f"{output}: holds no rows to score again")
    own_R = np.concatenate(own_differences).astype(np.float64)
    return RecomputedLogits(
        num_rows=num_compared,
        num_scored_tokens=len(own_R),
        mean_kl=float(np.concatenate(kl).mean()) if kl else None,
        max_kl=float(np.concatenate(kl).max()) if kl else None,
        top1_agreement=float(np.concatenate(is_top1).mean()) if is_top1 else None,
        mean_own_difference=float(own_R.mean()),
        max_own_difference=float(own_R.max()),
        tolerance=TOLERANCE[manifest.engine.dtype],
        kl_tolerance=TOLERANCE[manifest.engine.dtype] + _max_rounding_kl(manifest),
    )


def _max_rounding_kl(manifest: Manifest) -> float:
    """Returns the KL in nats that rounding a row's log-probs may add."""
    levels = manifest.capture.quantizer.levels
    return _STEPS_OF_KL * manifest.capture.top_k / levels**2 if levels else 0.0


def bucketed_kl(scores: TeacherScores, logprobs_RV: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns KL(stored || recomputed) of each row over the kept entries and the rest, float64 [R], in nats."""
    ids_RK, kept_RK = scores.topk()
    p_RK = np.exp(kept_RK.astype(np.float64))
    log_q_RK = np.take_along_axis(logprobs_RV, ids_RK, axis=1).astype(np.float64)
    is_used_RK = p_RK > 0
    terms_RK = p_RK * (np.where(is_used_RK, kept_RK, 0.0) - np.where(is_used_RK, log_q_RK, 0.0))
    q_rest_R = np.maximum(1.0 - np.where(is_used_RK, np.exp(log_q_RK), 0.0).sum(axis=1), 1e-12)
    p_rest_R = scores.rest_mass.astype(np.float64)
    rest_terms_R = p_rest_R * np.log(np.maximum(p_rest_R, 1e-12) / q_rest_R)
    return np.asarray(terms_RK.sum(axis=1) + rest_terms_R)


def _draw_rows(output: Location, manifest: Manifest, num_rows: int, seed: int) -> Iterator[ShardRow]:
    """Yields rows drawn without repetition from all published shards, in the order in which they are stored."""
    numbers = published_shards(output)
    starts = np.cumsum([0, *(read_receipt(output, number, manifest).num_rows for number in numbers)])
    total = int(starts[-1])
    picks = np.sort(np.random.default_rng(seed).choice(total, min(num_rows, total), replace=False))
    for number, start, stop in zip(numbers, starts[:-1], starts[1:], strict=True):
        picks_in_shard = picks[(picks >= start) & (picks < stop)] - start
        if not len(picks_in_shard):
            continue
        with closing(ShardFile(shard_path(output, number), manifest, number)) as shard:
            edges = np.cumsum([0, *(shard.num_group_rows(group) for group in range(shard.num_groups))]).tolist()
            for group in sorted({bisect_right(edges, int(pick)) - 1 for pick in picks_in_shard}):
                rows, first = shard.read_group(group), edges[group]
                yield from (rows[pick - first] for pick in picks_in_shard.tolist() if 0 <= pick - first < len(rows))


def _configured_image_root(output: Location) -> ImageRoot | None:
    """Returns the image root in the output's config.json, None if there is none."""
    try:
        config = json.loads(read_bytes(output / "config.json"))["config"]
        root, follow_symlinks = config["image_root"], config.get("follow_symlinks", False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if root is None else image_root_of(parse_location(root), follow_symlinks)
