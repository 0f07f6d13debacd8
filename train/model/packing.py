"""Checks that a student can take packed batches, that is, that its attention ends at the borders of sequences.

transformers finds the borders in position_ids that begin again at 0, if it gets no attention mask and no cache:

    sdpa, eager          a mask of T x T that is causal within each sequence, for full and for sliding attention
    flash_attention_2    the lengths of all sequences, for a kernel that needs no mask

A model that ignores the borders raises no error: each sequence then sees those before it, and only the loss is wrong.
So only models are accepted whose packed output tests have compared with that of each sequence alone. State-space layers
keep their state across borders, learned positions or ALiBi may count through them, and other kernels were not tried.
"""

from transformers import PreTrainedModel

from common.errors import ConfigError
from train.model.student import text_config

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def check_packing_supported(model: PreTrainedModel) -> None:
    """Checks that the student's attention keeps packed sequences apart.

    Raises:
        ConfigError: the architecture or the attention implementation is not one of those that tests have compared.
    """
    config = text_config(model)
    attention = config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    for what, found, known in (
        ("text model", config.model_type, TEXT_MODELS),
        ("attention", attention, ATTENTIONS),
    ):
        if found not in known:
            raise ConfigError(
                f'data.batching = "packed": the student\'s {what} is {found}, expected one of {", ".join(known)}: of '
                "others it is not known that packed samples do not see each other, and no error would tell; use "
                '"padded" (with data.group_by_length there is little padding)'
            )
