"""Compares shards written from a fixed seed of fake scores with the SHA-256 recorded in same_bytes.json.

`python -m tests.tools.same_bytes` prints what differs and exits with 1; with `--write` it records the digests of this
tree. Files depend on the versions of pyarrow and zstandard, so the digests hold for requirements-cpu.lock.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.data.samples import Kind
from common.shards.feature_shard import (
    CachedImage,
    FeatureRow,
    images_digest,
    pack_features,
    write_feature_shard,
    write_index,
)
from common.shards.manifest import (
    DatasetIdentity,
    EncoderIdentity,
    EngineIdentity,
    FeatureManifest,
    GenerateSettings,
    SkippedSample,
    open_output,
)
from common.shards.score_shard import write_shard
from tests.support.builders import make_manifest, make_rows

DIGESTS = Path(__file__).with_name("same_bytes.json")

_GENERATE = GenerateSettings(temperature=1.0, top_p=1.0, num_samples=2, max_new_tokens=64)

# Each output's name, kind of samples, kept entries a row, and settings of the capture.
_CAPTURES: dict[str, tuple[Kind, int, dict[str, Any]]] = {
    "kd-q8": ("kd", 64, {"precision": "q8"}),
    "kd-q8-wide": ("kd", 150, {"precision": "q8", "top_k": 150}),
    "kd-q6": ("kd", 20, {"precision": "q6", "top_k": 20}),
    "kd-fp16": ("kd", 20, {"precision": "fp16", "top_k": 20}),
    "kd-fp32": ("kd", 20, {"precision": "fp32", "top_k": 20}),
    "kd-top-p": ("kd", 20, {"precision": "q8", "top_k": 20, "top_p": 0.9, "min_k": 4}),
    "kd-draws": ("kd", 0, {"num_draws": 37, "top_k": 0, "seed": 5}),
    "kd-generated": ("kd", 8, {"precision": "q8", "top_k": 8, "seed": 5, "generate": _GENERATE}),
    "dpo": ("dpo", 0, {"top_k": 0}),
    "dpo-q8": ("dpo", 16, {"precision": "q8", "top_k": 16}),
}


def write_all(root: Path) -> Iterator[tuple[str, str]]:
    """Writes every output below `root` and yields the name and the SHA-256 of each of its files."""
    for name, (kind, top_k, settings) in _CAPTURES.items():
        _write_scores(root / name, kind, top_k, settings)
    for form in ("bf16", "q8"):
        _write_features(root / f"features-{form}", form)
    _write_features(root / "features-of-sizes", "bf16", varies=True)
    for path in sorted(root.rglob("*.*")):
        if path.is_file():
            yield path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()


def _write_scores(output: Path, kind: Kind, top_k: int, settings: dict[str, Any]) -> None:
    manifest = make_manifest(kind, num_samples=300, samples_per_shard=150, **settings)
    open_output(output, manifest)
    rows = make_rows(kind, 300, seed=11, top_k=top_k, num_tokens=40, num_draws=settings.get("num_draws"))
    write_shard(output, 0, manifest, rows[:150], [])
    write_shard(
        output, 1, manifest, rows[150:-2], [SkippedSample(index=n, id=f"s{n}", reason="bad") for n in (298, 299)]
    )


def _write_features(output: Path, form: Any, *, varies: bool = False) -> None:
    num_patches, num_channels = 16, 48
    images = [
        CachedImage(f"{n:064x}", (f"{n}.png", f"copy/{n}.png"), (28 * (n + 1), 28) if varies else None)
        for n in range(7)
    ]
    manifest = FeatureManifest(
        encoder=EncoderIdentity(
            architecture="clip_vision_model",
            weights_sha256="1" * 64,
            config_sha256="2" * 64,
            layers=() if varies else (2,),
            select_strategy="model" if varies else "default",
            processor_sha256="3" * 64,
            aspect_ratio="pad",
            dtype="bfloat16",
            tokens_per_image=None if varies else num_patches,
            num_channels=num_channels,
        ),
        dataset=DatasetIdentity(name="d.json", sha256="4" * 64, num_samples=9),
        engine=EngineIdentity(name="transformers", version="5", dtype="bfloat16"),
        num_images=len(images),
        images_sha256=images_digest(images),
        form=form,
        images_per_shard=4,
        images_per_group=1 if varies else 2,
    )
    open_output(output, manifest)
    write_index(output, images, manifest)
    rng = np.random.default_rng(3)
    shapes = [(n + 1 if varies else num_patches, num_channels) for n in range(len(images))]
    rows = [
        FeatureRow(n, image, pack_features(rng.normal(size=shapes[n]).astype(np.float32), form))
        for n, image in enumerate(images)
    ]
    write_feature_shard(output, 0, manifest, rows[:4])
    write_feature_shard(output, 1, manifest, rows[4:])


def main() -> int:
    """Compares all files, or records them with `--write`; returns 1 if any differs, else 0."""
    with tempfile.TemporaryDirectory() as directory:
        found = dict(write_all(Path(directory)))
    if "--write" in sys.argv[1:]:
        DIGESTS.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    known: dict[str, str] = json.loads(DIGESTS.read_text())
    differing = sorted(name for name in known.keys() | found.keys() if known.get(name) != found.get(name))
    for name in differing:
        sys.stdout.write(f"{name}: {known.get(name)} before, {found.get(name)} now\n")
    sys.stdout.write(f"{len(known) - len(differing)} of {len(known)} files have the bytes that they had\n")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main())
