"""Texts of an inspection that terminal and page share, and its JSON."""

import math
import re
from dataclasses import asdict
from typing import Any

from common.console import escape_control
from precompute.inspection.collect import FOOTERS, ColumnBytes, Inspection
from precompute.inspection.sample_view import SampleView, Token
from precompute.inspection.statistics import Distribution, Metric

# Names and texts, one for each line of a table.
Fields = list[tuple[str, str]]

_STORED = {"path": "stored by path", "bytes": "stored in the shards"}

QUANTILE_NAMES = ("min", "5%", "25%", "median", "75%", "95%", "max")


def provenance_fields(inspection: Inspection) -> Fields:
    """Returns what the manifest says of teacher, tokenizer, dataset and settings, with whole fingerprints."""
    manifest, capture = inspection.manifest, inspection.manifest.capture
    teacher, tokenizer, image, dataset = manifest.teacher, manifest.tokenizer, manifest.image, manifest.dataset
    generate = capture.generate
    kinds = {"kd": "kd, a conversation a sample", "dpo": "dpo, a chosen and a rejected answer a sample"}
    return [
        ("kind", kinds[manifest.kind]),
        ("teacher", f"{teacher.architecture}, {teacher.vocab_size:,} rows in its output layer"),
        ("teacher weights", teacher.weights_sha256),
        ("teacher config", teacher.config_sha256),
        ("tokenizer", f"{tokenizer.sha256}, {tokenizer.vocab_size:,} tokens"),
        (
            "chat template",
            tokenizer.template_sha256 + (f", {tokenizer.template_date}" if tokenizer.template_date else ""),
        ),
        (
            "images",
            "none"
            if image is None
            else f"{image.tokens_per_image or 'varying'} tokens each, {image.aspect_ratio}, {_STORED[capture.images]}",
        ),
        *([("image processor", image.processor_sha256)] if image is not None else []),
        ("dataset", f"{dataset.name}, {dataset.num_samples:,} samples"),
        ("dataset content", dataset.sha256),
        ("kept", _describe_kept(inspection)),
        *([("stored as", capture.precision)] if capture.precision is not None else []),
        (
            "responses",
            "the dataset's"
            if generate is None
            else f"the teacher's, {generate.num_samples} a sample, temperature {generate.temperature}, "
            f"top-p {generate.top_p}, at most {generate.max_new_tokens} tokens",
        ),
        ("scored", "responses" if capture.score == "response" else "all tokens but images and the first"),
        ("longest", f"{capture.max_tokens:,} tokens, images expanded"),
        ("engine", f"{manifest.engine.name} {manifest.engine.version}, {manifest.engine.dtype}"),
        ("manifest", manifest.sha256),
    ]


def count_fields(inspection: Inspection) -> Fields:
    """Returns the output's totals, and how much of it was read."""
    counts = inspection.counts
    read_all = counts.num_groups_read == counts.num_groups
    images = f"{counts.num_images_read:,}" + ("" if read_all else f" in the {counts.num_rows_read:,} rows read")
    return [
        ("shards", describe_completeness(inspection)),
        ("rows", f"{counts.num_rows:,}"),
        ("scored tokens", f"{counts.num_scored_tokens:,}"),
        ("images", images),
        ("skipped samples", f"{counts.num_skipped:,}, by choice"),
        ("bytes", f"{counts.num_bytes:,}"),
        ("read for what follows", describe_reading(inspection)),
    ]


def to_dict(inspection: Inspection) -> dict[str, Any]:
    """Returns the whole inspection for JSON, with the number of an image's bytes in place of them."""
    fields = {name: value for name, value in vars(inspection).items() if name not in ("path", "manifest", "samples")}
    samples = [
        vars(sample)
        | {
            "images": [
                {"path": image.path, "num_bytes": None if image.data is None else len(image.data)}
                for image in sample.images
            ],
            "conversations": [asdict(conversation) for conversation in sample.conversations],
        }
        for sample in inspection.samples
    ]
    return {
        "path": str(inspection.path),
        "ok": inspection.ok,
        "manifest": inspection.manifest.model_dump(mode="json"),
        **{
            name: [asdict(item) for item in value] if isinstance(value, tuple) else value
            for name, value in fields.items()
        },
        "counts": asdict(inspection.counts),
        "samples": samples,
    }


def describe_completeness(inspection: Inspection) -> str:
    """Returns how many shards are published, and whether these are all."""
    published, expected = inspection.num_published, inspection.num_expected
    num_unread = published - inspection.counts.num_shards
    text = f"{published:,} of {expected:,}" + (", complete" if published == expected else ", not complete yet")
    return text + (f"; {num_unread:,} of them cannot be read and are left out below" if num_unread else "")


def describe_reading(inspection: Inspection) -> str:
    """Returns how many row groups, rows and tokens the distributions were computed from."""
    counts = inspection.counts
    if counts.num_groups_read == counts.num_groups:
        return f"all {counts.num_groups:,} row groups"
    return (
        f"{counts.num_groups_read:,} of {counts.num_groups:,} row groups: {counts.num_rows_read:,} rows, "
        f"{counts.num_tokens_read:,} scored tokens"
    )


def column_rows(inspection: Inspection) -> list[tuple[str, int, float, float]]:
    """Returns name, compressed bytes, bytes a scored token and share of all bytes of each column, largest first.

    Columns whose names differ only in a number at the end are added up.
    """
    counts = inspection.counts
    families: dict[str, list[ColumnBytes]] = {}
    for column in inspection.columns:
        families.setdefault(re.sub(r"_\d+$", "_", column.name), []).append(column)
    rows = []
    for family, columns in families.items():
        name = columns[0].name if len(columns) == 1 else f"{family}0 to _{len(columns) - 1}"
        num_bytes = sum(column.num_bytes for column in columns)
        bytes_per_token, share = num_bytes / max(1, counts.num_scored_tokens), num_bytes / max(1, counts.num_bytes)
        rows.append((name, num_bytes, bytes_per_token, share))
    return sorted(rows, key=lambda row: -row[1])


def describe_columns(inspection: Inspection) -> str:
    """Returns what the names in the table of columns mean, and the size of the kept entries."""
    num_packed = sum(column.num_bytes for column in inspection.columns if column.is_packed)
    bytes_per_token = num_packed / max(1, inspection.counts.num_scored_tokens)
    return (
        f"Kept entries, topk_ columns: {bytes_per_token:,.2f} bytes a scored token; --unpack writes them as lists. "
        f"{FOOTERS}: all bytes outside columns."
    )


def format_number(value: float, metric: Metric) -> str:
    """Returns a value with the digits that its metric is shown with."""
    if metric.is_whole:
        return f"{value:,.1f}".removesuffix(".0")
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{value:.4f}" if metric.unit == "probability" else f"{round(value, 3) + 0.0:.3f}"


def format_distribution(distribution: Distribution) -> list[str]:
    """Returns the quantiles and the mean as texts."""
    return [format_number(value, distribution.measure) for value in (*distribution.quantiles, distribution.mean)]


def describe_sample(sample: SampleView) -> str:
    """Returns the id of a sample, its position in the dataset and its shard."""
    return f"sample {sample.sample_id}, position {sample.index:,} in the dataset, shard {sample.shard}"


def format_percent(probability: float) -> str:
    """Returns a probability as a percentage with at least two digits: 97%, 3.1%, 0.042%, <0.001%."""
    value = 100 * probability
    if value < 0.001:
        return "0%" if value == 0 else "<0.001%"
    decimals = 0 if value >= 99.95 else 1 if value >= 1 else 2 if value >= 0.1 else 3
    return f"{value:.{decimals}f}%"


def show_whitespace(text: str) -> str:
    """Returns a token's text with visible signs for spaces, tabs and line breaks."""
    return escape_control(text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣"))


def token_probability(token: Token) -> float:
    """Returns the probability of the scored token itself."""
    return math.exp(token.own_logprob)


def _describe_kept(inspection: Inspection) -> str:
    capture, vocab_size = inspection.manifest.capture, inspection.manifest.teacher.vocab_size
    if capture.num_draws is not None:
        return f"{capture.num_draws} draws a token, seed {capture.seed}"
    if capture.top_k == 0:
        return "no entries, the log-probs of the tokens alone"
    if capture.top_p is not None:
        return f"from {capture.min_k} to {capture.top_k} best entries, until they hold {capture.top_p}"
    return "the whole vocabulary" if capture.top_k >= vocab_size else f"the {capture.top_k} best entries"
