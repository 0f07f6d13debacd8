"""Writes the model card of a student: README.md, whose YAML header says what it was made of, as the hub reads it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from common.errors import StorageError
from train.run.history import StageHistory, find_stages

CARD_NAME = "README.md"

_TITLE = "A student distilled with Decant"

_LOSSES = ("distillation", "cross_entropy", "balance", "router_z", "preference")

# Metrics whose last values a card shows.
_METRICS = ("distillation", "cross_entropy", "preference", "balance", "rewards/accuracies")


def write_initial_card(out: Path, base_models: list[str], how: str) -> None:
    """Writes the card of a student that was not trained yet.

    Args:
        out: its directory.
        base_models: names of the models that it was made of.
        how: one sentence on how they were joined.

    Raises:
        StorageError: `out` cannot be written.
    """
    _write(out, base_models, [], [f"1. {how}"])


def write_card(source: Path, out: Path, how: str | None = None) -> None:
    """Writes the card of a student that was made from another: exported, or upcycled.

    Args:
        source: what it was made from; the stages that trained that one are read (`find_stages`), and the card of the
            student that the first one began with.
        out: its directory.
        how: one sentence on how it was made, if it is another model than `source`.

    Raises:
        StorageError: `out` cannot be written.
    """
    stages, first = find_stages(source)
    known = _read_card(first)
    base_models = (known.data.to_dict().get("base_model") if known is not None else None) or first.name or None
    history = [] if known is None else [line for line in known.text.splitlines() if line[:1].isdigit()]
    history = history or [f"1. Began with `{first.name}`."]
    for number, stage in enumerate(stages, len(history) + 1):
        history.append(f"{number}. {_describe(stage)}")
    if how is not None:
        history.append(f"{len(history) + 1}. {how}")
    datasets = [*dict.fromkeys(name for stage in stages for name in stage.data)]
    _write(out, [base_models] if isinstance(base_models, str) else list(base_models or []), datasets, history)


def _read_card(model_dir: Path) -> ModelCard | None:
    try:
        card: ModelCard = ModelCard.load(model_dir / CARD_NAME)
        return card
    except (OSError, ValueError):
        return None


def _describe(stage: StageHistory) -> str:
    """Returns one line on a stage: what it optimised, on what, how long, and where its metrics ended."""
    loss, optim, moe = (stage.config.get(name) or {} for name in ("loss", "optim", "moe"))
    terms = ", ".join(f"{name} {loss[name]:g}" for name in _LOSSES if loss.get(name))
    found = stage.last_metrics
    ends = ", ".join(
        f"{name} {found[name]:.4g}"
        for each in _METRICS
        for name in (each, f"eval_{each}")
        if isinstance(found.get(name), float)
    )
    experts = f" Upcycled to {moe['num_experts']} experts, top {moe['top_k']}." if moe else ""
    data = ", ".join(f"`{name}`" for name in stage.data)
    return (
        f"**{stage.name}**: {terms}; {stage.num_steps:,} steps of {optim.get('global_batch_size')} samples of {data}, "
        f"learning rate {optim.get('learning_rate')}.{experts} At the end: {ends or 'nothing logged'}."
    )


def _write(out: Path, base_models: list[str], datasets: list[str], history: list[str]) -> None:
    config: dict[str, Any] = json.loads((out / "config.json").read_text("utf-8"))
    takes_images = config.get("vision_config") is not None
    text = config.get("text_config") or config
    tags = ["decant", "knowledge-distillation", *(["mixture-of-experts"] if text.get("num_experts") else [])]
    header = ModelCardData(
        base_model=base_models or None,
        datasets=datasets or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if takes_images else "text-generation",
        tags=tags,
    )
    task = '"image-text-to-text"' if takes_images else '"text-generation"'
    body = f"""
# {_TITLE}

{config["architectures"][0]}, a standard class of transformers, which vLLM serves too.

## How it was made

{chr(10).join(history)}

## How to use it

```python
from transformers import pipeline

talk = pipeline({task}, model="DIRECTORY")
```

```
vllm serve DIRECTORY
```
"""
    try:
        (out / CARD_NAME).write_text(f"---\n{header.to_yaml()}\n---\n{body}", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{out}: the model card could not be written ({error}); free space") from error
