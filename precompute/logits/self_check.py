"""Checks vLLM's reading of a teacher on the first samples with images, before it scores the dataset.

expansion    before the weights are loaded: vLLM must read the tokens that the model's own processor makes of the
             images, id by id
scores       without a GPU vLLM must give the log-probs that transformers computes in float32: some of its kernels
             for CPUs leave out what a model does with images, and no error tells
"""

import logging
from contextlib import closing
from pathlib import Path

import numpy as np

from common.data.chat_encoding import expand_placeholders
from common.data.model_images import ModelImages, find_model_images
from common.errors import DataError, ModelError
from common.shards.scores import TeacherScores
from precompute.engine.score_conversion import show_difference
from precompute.engine.teacher import Teacher, engine_limits
from precompute.engine.vllm_engine import Prompt, PromptRenderer
from precompute.reference_teacher import TOLERANCE, ReferenceTeacher
from precompute.scorer import ScoreRequest, ScorerSettings

_log = logging.getLogger(__name__)


def check_expansion(settings: ScorerSettings) -> None:
    """Compares what vLLM's renderer and the model's processor make of `settings.probes`; loads no weights.

    Raises:
        ModelError: vLLM has no class for the model, or reads an image as other tokens than the model's processor.
    """
    if not settings.probes:
        return
    images = find_model_images(settings.model_dir)
    assert images is not None
    with PromptRenderer.without_engine(settings.model_dir, settings.engine, engine_limits(settings)) as renderer:
        for request in settings.probes:
            _check_expansion(renderer, request, images, settings.model_dir)


def check_scores(teacher: Teacher, settings: ScorerSettings) -> None:
    """Compares a started teacher's scores of `settings.probes` with the model's, where the device may be wrong.

    Raises:
        ModelError: its scores are not the model's.
    """
    # Replicas of a data-parallel engine work in step, and answers cannot be compared.
    if settings.probes and teacher.is_on_cpu and settings.generate is None and settings.engine.data_parallel_size == 1:
        _check_scores(teacher, settings.probes[-1], settings)


def _check_expansion(renderer: PromptRenderer, request: ScoreRequest, images: ModelImages, model_dir: Path) -> None:
    try:
        processed = [images.process(image, request.where).token_ids for image in request.images]
        found = renderer.expand(Prompt(request.encoded.input_ids, request.images, request.where))
    except DataError:
        # Such a sample is refused again when its turn comes, and stops the run or is skipped.
        return
    expected = expand_placeholders(request.encoded.input_ids, request.encoded.image_token_id, processed)
    if not np.array_equal(expected.ids, found.token_ids):
        raise ModelError(
            f"{model_dir}: vLLM makes other tokens of an image than the model's processor ({request.where}), "
            "so its scores would not be the student's\n"
            + show_difference("processor", expected.ids, "vLLM", found.token_ids)
            + "\ncompare the sizes in preprocessor_config.json and config.json with the published ones"
        )


def _check_scores(teacher: Teacher, request: ScoreRequest, settings: ScorerSettings) -> None:
    with closing(teacher.score([request])) as results:
        ((_, scores),) = list(results)
    if not isinstance(scores, TeacherScores):
        return
    reference = ReferenceTeacher(settings.model_dir, settings.vocab_size).logprobs(request.encoded, request.images)
    ids_R = request.encoded.response_ids
    difference = float(np.abs(scores.own_logprobs - reference[np.arange(len(ids_R)), ids_R]).max())
    tolerance = TOLERANCE[settings.engine.dtype]
    if not difference <= tolerance:
        raise ModelError(
            f"{settings.model_dir}: without a GPU vLLM's log-probs of {request.where} differ from transformers' by up "
            f"to {difference:.2g} nats, expected at most {tolerance}: its kernels for CPUs do not do all that this "
            "model does with images; capture it on a GPU, or take another teacher"
        )
    _log.info("%s: vLLM agrees with transformers in float32 to %.1e nats", request.where, difference)
