"""Which students take packed batches: those whose attention ends at the borders between sequences.

transformers reads the borders from position_ids that begin again at 0, if it is given no attention mask and no cache:

    sdpa, eager          a mask of T x T that is causal within each sequence, for full and for sliding attention
    flash_attention_2    the lengths of all sequences, for a kernel that needs no mask

Nothing fails where a model does not: each sequence then sees those before it, and only the loss knows. So a student has
to be one that tests have compared with its sequences alone. State-space layers carry their state across borders,
learned positions or ALiBi may count through them, and other kernels were not tried.
"""

from transformers import PreTrainedModel

from common.errors import ConfigError
from train.model.student import text_config

ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")


def check_packing_supported(model: PreTrainedModel) -> None:
    """Checks that the student's attention keeps packed sequences apart.

    Raises:
        ConfigError: another architecture or attention implementation than those that were checked.
    """
    config = text_config(model)
    for what, found, known in (
        ("text model", config.model_type, TEXT_MODELS),
        ("attention", config._attn_implementation, ATTENTIONS),
    ):
        if found not in known:
            raise ConfigError(
                f'data.batching = "packed": the student\'s {what} is {found}, expected one of {", ".join(known)}: of '
                "others it is not known that packed samples do not see each other, and no error would tell; use "
                '"padded" (with data.group_by_length there is little padding)'
            )
