"""Check of a training run's output before anything is written: it is new, empty, or that of a run to continue."""

import os
import re
from pathlib import Path
from typing import Any

from common.errors import ConfigError, shorten
from common.storage.files import Location
from common.storage.output_check import OutputKind, check_output
from train.config import TrainConfig
from train.run.checkpoint import MARKER

# Names in an output, and in `final`, that a run may write.
_OWN_NAMES = re.compile(
    r"(config|starts|broken-step|expert-load)\.json|metrics\.jsonl|expert-load\.png|tensorboard|checkpoints|final"
)
_MODEL_NAMES = re.compile(
    r"(.+\.)?(safetensors|safetensors\.index\.json|jinja|model)|"
    r"((.+_)?config|tokenizer|added_tokens|special_tokens_map|vocab|chat_template|complete)\.json|merges\.txt|README\.md"
)


def check_training_output(config: TrainConfig) -> None:
    """Checks that nothing of others is in the way of a run, before anything is written.

    Raises:
        ConfigError: the output holds what no run of training wrote, an input of the run, or a finished stage without a
            checkpoint to continue from.
    """
    output = config.output
    kind = OutputKind(
        "train",
        # A damaged record of a run with checkpoints is reported where the run continues.
        markers={
            "config.json": lambda found: _is_record(found) or (found is None and bool(_names(output / "checkpoints")))
        },
        is_own=lambda name: _OWN_NAMES.fullmatch(name) is not None,
    )
    model = config.model
    inputs: dict[str, Location | None] = {"model.path": model.path, "model.chat_template": model.chat_template}
    inputs |= {f"data set {number}": member.location for number, member in enumerate(config.data.sets, 1)}
    check_output(output, kind, {**inputs, "data.validation": config.data.validation})
    final, checkpoints = output / "final", output / "checkpoints"
    if foreign := [name for name in _names(final) if not _MODEL_NAMES.fullmatch(name)]:
        raise ConfigError(
            f"{final}: holds {shorten(', '.join(foreign))}, which train did not write and would remove with the "
            "student; move them away, or choose another output"
        )
    numbered = [name for name in _names(checkpoints) if name.startswith("checkpoint-")]
    if foreign := [name for name in numbered if not os.path.lexists(checkpoints / name / MARKER)]:
        raise ConfigError(
            f"{checkpoints}: holds {shorten(', '.join(foreign))}, without the {MARKER} of a checkpoint that train "
            "wrote; move them away, or choose another output"
        )
    if _names(final) and not numbered:
        raise ConfigError(
            f"{output}: holds a finished stage (final) and no checkpoint to continue from, so training would begin "
            "again and replace it; choose another output, or remove final"
        )


def _is_record(content: Any) -> bool:
    return isinstance(content, dict) and {"config", "data_sha256"} <= content.keys()


def _names(directory: Path) -> list[str]:
    """Returns the names in a directory; none if there is no such directory."""
    try:
        return sorted(os.listdir(directory))  # noqa: PTH208 - names are all that is needed
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be listed ({error.strerror}); choose another output") from error
