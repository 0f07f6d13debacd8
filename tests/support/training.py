"""Training runs for tests: makes data and scores, and starts ranks of the real trainer."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.data.chat_encoding import ChatEncoder, predicting_positions
from common.data.dataset import Dataset
from common.data.images import load_image
from common.data.model_images import LlavaImages
from common.data.samples import Kind, Sample
from common.shards.manifest import (
    CaptureSettings,
    DatasetIdentity,
    EngineIdentity,
    ImageIdentity,
    Manifest,
    TeacherIdentity,
    TokenizerIdentity,
    open_output,
)
from common.shards.score_shard import ScoredConversation, ShardRow, write_shard
from common.shards.scores import scores_from_draws, scores_from_topk
from tests.support.forward import expand
from train.model.student import is_multimodal, load_student

ROOT = Path(__file__).resolve().parents[2]


def write_mixed_dataset(directory: Path, num_samples: int, kind: Kind = "kd") -> Path:
    """Writes a dataset of samples of many lengths; every other one has an image, every third has a second turn."""
    rng = np.random.default_rng(0)
    directory.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = []
    for number in range(num_samples):
        words = " ".join(f"word{w}" for w in rng.integers(0, 50, rng.integers(1, 9)))
        record: dict[str, Any] = {"id": f"s{number}"}
        marker = ""
        if number % 2 == 0:
            pixels = rng.integers(0, 255, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(directory / f"{number}.png")
            record["image"] = f"{number}.png"
            marker = "<image>\n"
        question = {"from": "human", "value": f"{marker}what about {words}?"}
        if kind == "dpo":
            record["chosen"] = [question, {"from": "gpt", "value": f"yes {words}"}]
            record["rejected"] = [question, {"from": "gpt", "value": f"no {number} {words[:5]}"}]
        else:
            record["conversations"] = [question, {"from": "gpt", "value": words.upper()}]
            if number % 3 == 0:
                more = [{"from": "human", "value": "and then?"}, {"from": "gpt", "value": f"then {number}"}]
                record["conversations"] += more
        records.append(record)
    path = directory / f"{kind}.json"
    path.write_text(json.dumps(records))
    return path


class LiveTeacher:
    """Scores conversations with transformers in float32, one at a time and unpadded, as a simple reference."""

    def __init__(self, model_dir: Path, image_root: Path | None) -> None:
        self.model = load_student(model_dir, dtype=torch.float32).eval()
        self.encoder = ChatEncoder.load(model_dir)
        self._spec = LlavaImages.load(model_dir) if is_multimodal(self.model) else None
        self._root = image_root
        self._model_dir = model_dir

    def logprobs(self, sample: Sample, number: int) -> tuple[Any, Tensor]:
        """Returns the encoding of conversation `number` of a sample, and its log-probs over all ids, float32 [R, V]."""
        from transformers import AutoImageProcessor

        encoded = self.encoder.encode_sample(sample)[number]
        width = 1 if self._spec is None else self._spec.tokens_per_image
        ids, positions = expand(encoded.input_ids, encoded.image_token_id, width)
        inputs: dict[str, Tensor] = {"input_ids": torch.from_numpy(ids.astype(np.int64))[None]}
        if sample.images:
            assert self._spec is not None
            processor = AutoImageProcessor.from_pretrained(self._model_dir)
            images = [load_image(ref, self._root, "pad", self._spec.mean_rgb, "") for ref in sample.images]
            inputs["pixel_values"] = processor(images=images, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = self.model(**inputs).logits[0].float()
        # Padding rows stand for no token.
        logits[:, self.encoder.vocab_size :] = -torch.inf
        rows = positions[predicting_positions(encoded.response_positions)]
        return encoded, logits.log_softmax(-1)[torch.from_numpy(rows)]

    def write_output(  # noqa: PLR0913 - tests vary each of them alone
        self,
        output: Path,
        dataset_path: Path,
        kind: Kind,
        top_k: int = 0,
        shard: int = 16,
        *,
        num_draws: int | None = None,
    ) -> Path:
        """Writes an output like that of precompute-logits, with the `top_k` best entries or `num_draws` draws."""
        dataset = Dataset.open(dataset_path, kind)
        image = None
        if self._spec is not None:
            image = ImageIdentity(
                processor_sha256=self._spec.sha256, aspect_ratio="pad", tokens_per_image=self._spec.tokens_per_image
            )
        manifest = Manifest(
            kind=kind,
            teacher=TeacherIdentity(
                architecture="x", weights_sha256="x", config_sha256="x", vocab_size=self.encoder.vocab_size
            ),
            tokenizer=TokenizerIdentity(
                sha256=self.encoder.tokenizer_sha256,
                vocab_size=self.encoder.vocab_size,
                template_sha256=self.encoder.template_sha256,
            ),
            image=image,
            dataset=DatasetIdentity(name="x", sha256=dataset.sha256, num_samples=len(dataset)),
            capture=CaptureSettings(
                top_k=top_k,
                top_p=None,
                min_k=1,
                num_draws=num_draws,
                precision=None if num_draws else "fp32",
                images="path",
                seed=None if num_draws is None else 0,
                generate=None,
                score="response",
                max_tokens=2048,
                on_bad_sample="stop",
            ),
            engine=EngineIdentity(name="transformers", version="5", dtype="float32"),
            samples_per_shard=shard,
        )
        open_output(output, manifest)
        for number in range(manifest.num_shards):
            rows = [self._row(dataset, i, kind, top_k, num_draws) for i in manifest.shard_range(number)]
            write_shard(output, number, manifest, rows, [])
        return output

    def _row(self, dataset: Dataset, index: int, kind: Kind, top_k: int, num_draws: int | None) -> ShardRow:
        sample = dataset[index]
        scored = []
        for number in range(2 if kind == "dpo" else 1):
            encoded, logprobs = self.logprobs(sample, number)
            own = logprobs.gather(1, torch.from_numpy(encoded.response_ids.astype(np.int64))[:, None])[:, 0]
            if num_draws is None:
                top = logprobs[:, : self.encoder.vocab_size].topk(top_k)
                scores = scores_from_topk(own.numpy(), top.indices.numpy(), top.values.numpy())
            else:
                generator = torch.Generator().manual_seed(index)
                drawn = logprobs.exp().multinomial(num_draws, replacement=True, generator=generator)
                scores = scores_from_draws(own.numpy(), drawn.numpy())
            scored.append(ScoredConversation(encoded, scores))
        return ShardRow(index, sample, tuple(scored))


def stage(output: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """Makes a configuration in float32 with a constant learning rate; `changes` replace or extend its tables."""
    config: dict[str, Any] = {
        "stage": "sft",
        "output": str(output),
        "model": {"path": str(model)},
        "data": {"num_workers": 0},
        "loss": {},
        "optim": {
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "micro_batch_size": 2,
            "scheduler": "constant",
            "warmup_ratio": 0.0,
            # With Adam's usual 1e-8, a gradient that consists of rounding errors would make a full step, so that the
            # weights of equal runs would differ. With 1e-4 they differ in proportion to their gradients.
            "eps": 1e-4,
        },
        "run": {"precision": "fp32", "zero_stage": 0, "activation_checkpointing": False, "save_steps": 1000},
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    return config


def run_stages(configs: Sequence[dict[str, Any]], scratch: Path, num_ranks: int = 1, timeout_s: float = 600) -> None:
    """Trains stages one after the other in one group of processes, and asserts that each rank succeeds."""
    for code, output in launch(configs, scratch, num_ranks, timeout_s):
        assert code == 0, output[-6000:]


def launch(
    configs: Sequence[dict[str, Any]], scratch: Path, num_ranks: int = 1, timeout_s: float = 600
) -> list[tuple[int, str]]:
    """Trains stages like `run_stages`, and returns each rank's exit code and output, also after a failure."""
    scratch.mkdir(parents=True, exist_ok=True)
    stages = scratch / f"stages-{num_ranks}.json"
    stages.write_text(json.dumps(list(configs)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.training_worker", str(stages)],
            cwd=ROOT,
            env=environment(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def environment(**extra: str) -> dict[str, str]:
    """Returns the environment of a child process, with a single thread so that sums have one order."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}


def weights(output: Path) -> dict[str, Tensor]:
    """Returns the trained student's weights."""
    from safetensors.torch import load_file

    return load_file(output / "final" / "model.safetensors")


def losses(output: Path) -> list[float]:
    """Returns the loss of each step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Returns the largest absolute difference over all weights."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
