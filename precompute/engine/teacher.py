"""The frozen teacher: conversations or prompts in, scores of response tokens out.

Legend: R scored tokens.
"""

import logging
from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import vllm
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from common.data.chat_encoding import predicting_positions
from common.errors import ModelError
from precompute.engine.row_request import CapturedRows, CapturedSamplerSteps, RowRequest
from precompute.engine.score_conversion import (
    ExpandedPrompt,
    draw_seed,
    expanded_positions,
    rows_from_flat_logprobs,
    scores_from_rows,
)
from precompute.engine.vllm_engine import Engine, EngineLimits, Prompt
from precompute.engine.vllm_patch import mask_padding_rows, start_capture
from precompute.scorer import (
    GeneratedResponse,
    RejectedRequest,
    RequestKey,
    ScoreRequest,
    ScorerSettings,
    ScoringResult,
)

logger = logging.getLogger(__name__)


class Teacher:
    """A vLLM engine that scores conversations, or answers prompts and scores its answers in the same pass."""

    def __init__(self, settings: ScorerSettings) -> None:
        """Starts the engine; see `Engine` for what it raises.

        Raises:
            ModelError: engine.capture is "in-engine" and this vLLM is not one that capture knows, or padding rows
                cannot be masked.
        """
        self.settings = settings
        self._engine = Engine(
            settings.model_dir,
            settings.engine,
            engine_limits(settings),
            # A prompt is read once for all its responses; positions of a conversation may not be cached, because
            # cached ones get no scores.
            prefix_caching=settings.generate is not None,
            data_parallel_rank=settings.node_rank,
        )
        # Says, by the request's key, which rows of vLLM's own log-probs are wanted.
        self._wanted: dict[RequestKey, RowRequest] = {}
        self._mask_padding_rows()
        self.in_engine = self._start_capture()

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        """Yields results in the order in which they are finished; `requests` is iterated in another thread.

        Raises:
            ModelError: the engine died, or what it returned does not fit the request.
        """
        num_responses = 1 if self.settings.generate is None else self.settings.generate.num_samples
        prompts = (
            ((request, number), Prompt(request.encoded.input_ids, request.images, request.where))
            for request in requests
            for number in range(num_responses)
        )
        params = self._scoring_params if self.settings.generate is None else self._generating_params
        with closing(self._engine.run(prompts, params)) as outputs:
            for (request, number), output in outputs:
                if isinstance(output, RejectedRequest):
                    # vLLM rejects a prompt once for each of its responses.
                    if number == 0:
                        yield request.key, output
                elif self.settings.generate is None:
                    rows = self._scored_rows(output, request)
                    yield request.key, scores_from_rows(rows, self.settings, request.where)
                else:
                    yield request.key, self._generated_response(output, request, number)

    @property
    def is_on_cpu(self) -> bool:
        """True if the engine runs without a GPU."""
        return bool(current_platform.is_cpu())

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()

    def _mask_padding_rows(self) -> None:
        num_ids, num_rows = self.settings.vocab_size, self.settings.output_vocab_size
        if num_ids == num_rows:
            return
        if problem := mask_padding_rows(self._engine.collective_rpc, num_ids):
            self.close()
            raise ModelError(
                f"the teacher's output layer has {num_rows - num_ids} rows more than the tokenizer has ids, and vLLM "
                f"{vllm.__version__} cannot be made to leave them out: {problem}; install this program into vLLM's "
                "environment (pip install .), so that vLLM finds its plugin"
            )

    def _start_capture(self) -> bool:
        """Turns capture in the engine on, if it is configured; returns True if it is on.

        Raises:
            ModelError: engine.capture is "in-engine", and this vLLM cannot be patched.
        """
        mode = self.settings.engine.capture
        problem = "engine.capture is stock" if mode == "stock" else start_capture(self._engine.collective_rpc)
        if problem and mode == "in-engine":
            self.close()
            raise ModelError(
                f"vLLM {vllm.__version__} cannot capture in the engine: {problem}; install a version that this program "
                'names in its requirements, or set engine.capture = "stock", which is slower'
            )
        if problem:
            logger.log(
                logging.INFO if mode == "stock" else logging.WARNING,
                "capture: vLLM's own prompt log-probs of every position (%s)",
                problem,
            )
        else:
            logger.info("capture: the wanted rows, in the engine")
        return not problem

    def _scoring_params(self, key: tuple[ScoreRequest, int], prompt: ExpandedPrompt) -> SamplingParams:
        """Returns vLLM's parameters of a conversation that is to be scored."""
        request, _ = key
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        wanted = self._row_request(request, prompt)
        if self.in_engine:
            params.extra_args = wanted.extra_args()
        else:
            self._wanted[request.key] = wanted
            params.prompt_logprobs = _num_stock_logprobs(self.settings)
            params.flat_logprobs = True
        return params

    def _generating_params(self, key: tuple[ScoreRequest, int], prompt: ExpandedPrompt) -> SamplingParams:
        """Returns vLLM's parameters of a prompt that is to be answered."""
        (request, number), settings = key, self.settings
        assert settings.generate is not None
        seed = draw_seed(settings.seed, request.sample_id, number)
        # An image token would stand for an image that does not exist.
        banned = {request.encoded.image_token_id} - {None}
        params = SamplingParams(
            max_tokens=min(settings.generate.max_new_tokens, settings.max_tokens - len(prompt.token_ids)),
            temperature=settings.generate.temperature,
            top_p=settings.generate.top_p,
            seed=int(seed[:15], 16),
            logprobs=_num_stock_logprobs(settings),
            flat_logprobs=True,
            logit_bias=dict.fromkeys(banned, -100.0) or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self.in_engine:
            params.extra_args = CapturedSamplerSteps.extra_args(settings.num_draws or 0, seed)
        return params

    def _generated_response(self, output: RequestOutput, request: ScoreRequest, number: int) -> GeneratedResponse:
        """Returns the response that vLLM wrote, with the scores of its tokens."""
        settings, completion = self.settings, output.outputs[0]
        response_ids = np.asarray(completion.token_ids, np.int32)
        found = completion.logprobs
        if isinstance(found, FlatLogprobs):
            row_request = RowRequest(
                rows=np.arange(len(response_ids), dtype=np.int32),
                targets=response_ids,
                vocab_size=settings.output_vocab_size,
                top_k=settings.top_k,
                num_draws=settings.num_draws or 0,
                seed=draw_seed(settings.seed, request.sample_id, number),
            )
            rows = rows_from_flat_logprobs(found, row_request, row_request.rows, request.where)
        elif isinstance(found, CapturedSamplerSteps):
            rows = found.rows()
        else:
            raise ModelError(f"{request.where}: vLLM returned no scores")
        return GeneratedResponse(number, response_ids, scores_from_rows(rows, settings, request.where))

    def _row_request(self, request: ScoreRequest, prompt: ExpandedPrompt) -> RowRequest:
        """Returns which rows of the expanded prompt score the response tokens of a conversation."""
        positions_R = expanded_positions(prompt, request.encoded, request.where)
        return RowRequest(
            rows=predicting_positions(positions_R).astype(np.int32),
            targets=request.encoded.response_ids.astype(np.int32),
            vocab_size=self.settings.output_vocab_size,
            top_k=self.settings.top_k,
            num_draws=self.settings.num_draws or 0,
            seed=draw_seed(self.settings.seed, request.sample_id, request.key[1]),
        )

    def _scored_rows(self, output: RequestOutput, request: ScoreRequest) -> CapturedRows:
        """Returns the rows of a conversation, captured in the engine or taken out of vLLM's own log-probs."""
        found = output.prompt_logprobs
        if isinstance(found, CapturedRows):
            rows = found
        elif isinstance(found, FlatLogprobs):
            row_request = self._wanted.pop(request.key)
            # vLLM stores the distribution that token i is drawn from at i; the row that predicts it is i - 1.
            rows = rows_from_flat_logprobs(found, row_request, row_request.rows + 1, request.where)
        else:
            raise ModelError(f"{request.where}: vLLM returned no scores")
        num_scored = len(request.encoded.response_ids)
        if len(rows.own) != num_scored:
            raise ModelError(f"{request.where}: vLLM returned {len(rows.own)} rows for {num_scored} scored tokens")
        return rows


def engine_limits(settings: ScorerSettings) -> EngineLimits:
    """Returns the largest requests that a teacher's engine has to take."""
    return EngineLimits(
        # vLLM generates at least one token, which needs room.
        max_model_len=settings.max_tokens + 1,
        max_images=settings.max_images,
        max_logprobs=_num_stock_logprobs(settings),
    )


def _num_stock_logprobs(settings: ScorerSettings) -> int:
    """Returns the number of entries to request of vLLM's own log-probs: all (-1) where ids are drawn from them."""
    return -1 if settings.num_draws else settings.top_k
