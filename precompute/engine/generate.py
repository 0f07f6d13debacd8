"""Greedy answers of a model under vLLM, which show that an exported student loads where teachers run."""

from collections.abc import Sequence
from pathlib import Path

from vllm import SamplingParams

from common.data.chat_encoding import ChatEncoder
from common.data.images import load_image
from common.data.model_images import find_model_images, find_placeholder
from common.data.samples import Sample, without_last_response
from common.errors import DataError, ModelError
from precompute.config import EngineConfig
from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
from precompute.fingerprints import ModelFacts
from precompute.scorer import RejectedRequest


def generate_answers(  # noqa: PLR0913 - four options of one call, each with a default
    model_dir: Path,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int = 32,
    max_tokens: int = 2048,
    image_root: Path | None = None,
    engine: EngineConfig | None = None,
) -> list[str]:
    """Returns the model's greedy answer in place of each sample's last turn, without special tokens.

    `max_tokens` bounds prompt and answer together, images expanded; it is lowered to the model's context. Images are
    padded to squares for LLaVA, and decoded ahead of the engine only as far as requests fit into it.

    Raises:
        ModelError: vLLM cannot load the model.
        DataError: an image cannot be read, or a prompt leaves no room for an answer.
    """
    images = find_model_images(model_dir)
    encoder = ChatEncoder.load(model_dir, placeholder=find_placeholder(images))
    context = ModelFacts.load(model_dir).context_tokens
    limit = max_tokens if context is None else min(max_tokens, context)
    if images is None and any(sample.images for sample in samples):
        raise ModelError(f"{model_dir}: has no vision tower, but there are images to look at")

    def make_prompt(sample: Sample) -> Prompt:
        where = f"sample {sample.id!r}"
        loaded = tuple(
            load_image(ref, image_root, images.default_aspect_ratio, images.mean_rgb, where)
            for ref in sample.images
            if images is not None
        )
        return Prompt(encoder.encode_prompt(without_last_response(sample.conversations[0])), loaded, where)

    limits = EngineLimits(
        max_model_len=limit,
        max_images=0 if images is None else max(1, limit // images.min_tokens_per_image),
        max_logprobs=0,
    )
    running = Engine(model_dir, engine or EngineConfig(), limits)
    try:
        answers = [""] * len(samples)
        params = SamplingParams(max_tokens=max_new_tokens, temperature=0.0, detokenize=False)
        prompts = ((number, make_prompt(sample)) for number, sample in enumerate(samples))
        for number, output in running.run(prompts, lambda *_: params):
            if isinstance(output, RejectedRequest):
                raise DataError(output.reason)
            # vLLM's own text would lack an incomplete last character, which transformers' text has.
            answers[number] = encoder.tokenizer.decode(output.outputs[0].token_ids, skip_special_tokens=True)
    finally:
        running.close()
    return answers
