"""Counts the tokens of a dataset and the parameters of a teacher, without reading a weight or an image.

    dataset ─ measure_workload ─> Workload        counts of random samples, which `extrapolate` scales to the whole
    config.json ─ ModelShape.load ─> ModelShape   parameters, counted on the meta device

Legend: N samples of the dataset, n of them counted, T tokens of a conversation with its images expanded.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from common.data.chat_template import TemplateRefusalError
from common.errors import ConfigError, DataError, ModelError
from precompute.config import GenerateConfig
from precompute.logits.job import CaptureInputs, EncodedSample

# Standard errors fall with the square root of this. 2,000 samples take seconds and give totals to a few percent.
NUM_COUNTED = 2000

_LISTED_REASONS = 3

_ID_BYTES = 4

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExtrapolatedTotal:
    """Estimated total of the whole dataset. `error` is one standard error, 0 if every sample was counted."""

    value: float
    error: float


@dataclass(frozen=True)
class Workload:
    """Counts of randomly chosen samples, int64 [n] each; 0 for samples that cannot be used.

    `prompt_n` and `scored_n` are the tokens that the teacher reads, images expanded, over all conversations of a
    sample; `squares_n` is the sum of T^2 over its conversations, `image_squares_n` that of its images' tokens, squared.
    `text_bytes_n` is what a shard repeats of a sample: its messages, and 4 bytes for each token id, where an image is
    one token. With `generate`, each response is assumed to be as long as allowed; `prompt_n` counts a prompt once for
    each response, and `squares_n` is over prompts. `reasons` say why the first unusable samples cannot be used.
    """

    num_samples: int
    reasons: tuple[str, ...]
    prompt_n: Counts
    scored_n: Counts
    squares_n: Counts
    images_n: Counts
    image_tokens_n: Counts
    image_squares_n: Counts
    text_bytes_n: Counts
    unusable_n: Counts

    @property
    def num_counted(self) -> int:
        """Number of counted samples, n."""
        return len(self.scored_n)

    def total(self, values_n: npt.NDArray[np.number]) -> ExtrapolatedTotal:
        """Extrapolates values [n] of the counted samples to a total of the dataset."""
        return extrapolate(values_n, self.num_samples)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model.

    `body_parameters` are those of the language model that each token passes: embeddings and output layer are left out,
    and of a layer's experts only the share that a token is sent to is counted. The vision sizes are 0 without a tower.
    """

    num_parameters: int
    body_parameters: int
    adapter_parameters: int
    vision_parameters: int
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vision_layers: int
    vision_hidden_size: int

    @classmethod
    def load(cls, model_dir: Path) -> "ModelShape":
        """Builds the model that config.json describes on the meta device and counts its parameters.

        Raises:
            ModelError: no configuration there, or none that transformers builds a language model from.
        """
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

        try:
            config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
            auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
            with torch.device("meta"):
                model = auto_class.from_config(config)
            text, vision = config.get_text_config(), getattr(config, "vision_config", None)
            decoder = model.get_decoder()
            embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
            heads = int(text.num_attention_heads)
            sizes = (int(text.vocab_size), int(text.hidden_size), int(text.num_hidden_layers), heads)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{model_dir}/config.json: no language model can be built from it ({error})") from error
        num_parameters = sum(p.numel() for p in model.parameters())
        in_decoder = sum(p.numel() for p in decoder.parameters())
        in_experts = sum(p.numel() for name, p in decoder.named_parameters() if ".experts." in name)
        in_output = 0 if output.weight is embedding.weight else output.weight.numel()
        in_tower = 0 if vision is None else sum(p.numel() for p in model.get_encoder(modality="image").parameters())
        num_experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
        idle_share = 1 - text.num_experts_per_tok / num_experts if in_experts else 0
        return cls(
            num_parameters,
            in_decoder - embedding.weight.numel() - round(idle_share * in_experts),
            num_parameters - in_decoder - in_output - in_tower,
            in_tower,
            *sizes,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            # Qwen2-VL's tower is as wide as its embed_dim; its hidden_size is the language model's.
            vision_layers=getattr(vision, "num_hidden_layers", getattr(vision, "depth", 0)),
            vision_hidden_size=getattr(vision, "embed_dim", getattr(vision, "hidden_size", 0)),
        )


def extrapolate(values_n: npt.NDArray[np.number], num_samples: int) -> ExtrapolatedTotal:
    """Estimates the total of N values from n that were drawn without replacement.

    The total is N mean, its standard error N sqrt(s^2 / n (1 - n / N)): the estimator of a simple random sample with
    the finite population correction.
    """
    num_counted = len(values_n)
    mean = float(values_n.mean())
    if num_counted == num_samples:
        return ExtrapolatedTotal(mean * num_samples, 0.0)
    variance_of_mean = float(values_n.var(ddof=1)) / num_counted * (1 - num_counted / num_samples)
    return ExtrapolatedTotal(mean * num_samples, num_samples * variance_of_mean**0.5)


def measure_workload(
    inputs: CaptureInputs, num_counted: int = NUM_COUNTED, *, seed: int = 0, progress: bool = True
) -> Workload:
    """Encodes and checks `num_counted` random samples as a capture would, or all if there are no more.

    No image is decoded. A sample that cannot be used is counted as unusable, whatever on_bad_sample says.

    Raises:
        ConfigError: the chat template refuses each counted sample.
    """
    num_samples = len(inputs.dataset)
    chosen = np.random.default_rng(seed).permutation(num_samples)[:num_counted]
    rows: list[tuple[int, ...]] = []
    reasons: list[str] = []
    num_refused = 0
    for index in tqdm(np.sort(chosen), desc="counting", unit=" samples", disable=not progress):
        try:
            sample = inputs.load_encoded(int(index))
        except DataError as error:
            reasons.append(str(error))
            num_refused += isinstance(error, TemplateRefusalError)
            rows.append((0, 0, 0, 0, 0, 0, 0, 1))
        else:
            rows.append((*_count_sample(inputs, sample), 0))
    if num_refused == len(rows):
        raise ConfigError(f"the chat template refuses every sample, such as: {reasons[0]}")
    columns = np.array(rows, np.int64).T
    return Workload(num_samples, tuple(reasons[:_LISTED_REASONS]), *columns)


def _count_sample(inputs: CaptureInputs, found: EncodedSample) -> tuple[int, int, int, int, int, int, int]:
    """Returns the counts of a sample in the order of `Workload`, from prompt tokens to bytes of text."""
    sample, encoded, lengths = found.sample, found.encoded, found.lengths
    scored = sum(len(conversation.response_ids) for conversation in encoded)
    image_tokens = len(encoded) * sum(found.image_tokens)
    image_squares = len(encoded) * sum(count**2 for count in found.image_tokens)
    text_bytes = sum(_ID_BYTES * len(conversation.input_ids) for conversation in encoded)
    text_bytes += sum(len(turn.content.encode()) for turns in sample.conversations for turn in turns)
    prompt, squares = sum(lengths) - scored, sum(length**2 for length in lengths)
    if inputs.config.generate is not None:
        (length,) = lengths
        prompt, scored = _count_generated(length, inputs.max_tokens, inputs.config.generate)
        squares = inputs.config.generate.num_samples * length**2
        # A new token adds its id and about as many bytes of text.
        text_bytes = inputs.config.generate.num_samples * text_bytes + 2 * _ID_BYTES * scored
    return prompt, scored, squares, len(sample.images), image_tokens, image_squares, text_bytes


def _count_generated(prompt_tokens: int, max_tokens: int, generate: GenerateConfig) -> tuple[int, int]:
    """Returns the tokens of the prompts and of the responses, each response as long as allowed."""
    max_length = min(generate.max_new_tokens, max_tokens - prompt_tokens)
    return generate.num_samples * prompt_tokens, generate.num_samples * max_length
