"""The frozen teacher: conversations or prompts in, scores of response tokens out.

Legend: T own sequence (one placeholder an image), T' the engine's expanded sequence, R scored tokens, K kept, D drawn,
V the output layer.
"""

import hashlib
import logging
from collections.abc import Generator, Iterable
from contextlib import closing

import numpy as np
import numpy.typing as npt
import vllm
from vllm import RequestOutput, SamplingParams
from vllm.logprobs import FlatLogprobs
from vllm.sampling_params import RequestOutputKind

from common.data.chat_encoding import EncodedChat, predicting_positions
from common.errors import ConfigError, ModelError
from common.shards.scores import TeacherScores, scores_from_draws, scores_from_topk
from precompute.engine.row_request import (
    CapturedRows,
    CapturedSamplerSteps,
    RowRequest,
    draw_from_distributions,
    request_uniforms,
)
from precompute.engine.vllm_engine import Engine, Prompt
from precompute.engine.vllm_patch import start_capture
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

    def __init__(self, plan: ScorerSettings) -> None:
        """Starts the engine; see `Engine` for what it raises.

        Raises:
            ConfigError: `top_k` exceeds the vocabulary.
            ModelError: engine.capture is "in-engine" and this vLLM is not one that capture knows.
        """
        if plan.top_k > plan.output_vocab_size:
            raise ConfigError(
                f"top_k = {plan.top_k} exceeds the {plan.output_vocab_size} entries of the teacher's vocabulary; "
                'give "all" to keep every one'
            )
        self._plan = plan
        self._engine = Engine(
            plan.model_dir,
            plan.engine,
            # vLLM generates at least one token, for which there must be room.
            max_model_len=plan.max_tokens + 1,
            max_images=plan.max_images,
            max_logprobs=_stock_logprobs(plan),
            # A prompt is read once for all its responses; of a conversation, cached positions would have no scores.
            prefix_caching=plan.generate is not None,
            data_parallel_rank=plan.node_rank,
        )
        self.in_engine = self._start_capture()

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        """Answers in the order in which they are finished; `requests` is drawn in another thread.

        Raises:
            ModelError: the engine died, or what it returned does not fit the request.
        """
        num_responses = 1 if self._plan.generate is None else self._plan.generate.num_samples
        prompts = (
            ((request, number), Prompt(request.encoded.input_ids, request.images, request.where))
            for request in requests
            for number in range(num_responses)
        )
        params = self._params if self._plan.generate is None else self._generating_params
        with closing(self._engine.run(prompts, params)) as outputs:
            for (request, number), output in outputs:
                if isinstance(output, RejectedRequest):
                    # What vLLM says of a prompt it says of each of its responses.
                    if number == 0:
                        yield request.key, output
                elif self._plan.generate is None:
                    rows = self._rows(output, request)
                    yield request.key, to_scores(rows, self._plan, request.where)
                else:
                    yield request.key, self._generated(output, request, number)

    def close(self) -> None:
        """Stops the engine."""
        self._engine.close()

    def _start_capture(self) -> bool:
        way = self._plan.engine.capture
        lacks = "engine.capture is stock" if way == "stock" else start_capture(self._engine.collective_rpc)
        if lacks and way == "in-engine":
            self.close()
            raise ModelError(
                f"vLLM {vllm.__version__} cannot capture in the engine: {lacks}; install a version that this program "
                'names in its requirements, or set engine.capture = "stock", which is slower'
            )
        if lacks:
            logger.log(
                logging.INFO if way == "stock" else logging.WARNING,
                "capture: vLLM's own prompt log-probs of every position (%s)",
                lacks,
            )
        else:
            logger.info("capture: the wanted rows, in the engine")
        return not lacks

    def _params(self, companion: tuple[ScoreRequest, int], expanded_ids: list[int]) -> SamplingParams:
        request, _ = companion
        params = SamplingParams(
            max_tokens=1, temperature=0.0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        if self.in_engine:
            params.extra_args = self._wish(request, expanded_ids).extra_args()
        else:
            params.prompt_logprobs = _stock_logprobs(self._plan)
            params.flat_logprobs = True
        return params

    def _generating_params(self, companion: tuple[ScoreRequest, int], expanded_ids: list[int]) -> SamplingParams:
        (request, number), plan = companion, self._plan
        assert plan.generate is not None
        seed = draw_seed(plan.seed, request.sample_id, number)
        # Ids that a student cannot be given as text: padding of the output layer, and images that do not exist.
        banned = {*range(plan.vocab_size, plan.output_vocab_size), request.encoded.image_token_id} - {None}
        params = SamplingParams(
            max_tokens=min(plan.generate.max_new_tokens, plan.max_tokens - len(expanded_ids)),
            temperature=plan.generate.temperature,
            top_p=plan.generate.top_p,
            seed=int(seed[:15], 16),
            logprobs=_stock_logprobs(plan),
            flat_logprobs=True,
            logit_bias=dict.fromkeys(banned, -100.0) or None,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if self.in_engine:
            params.extra_args = CapturedSamplerSteps.ask(plan.num_draws or 0, seed)
        return params

    def _generated(self, output: RequestOutput, request: ScoreRequest, number: int) -> GeneratedResponse:
        plan, completion = self._plan, output.outputs[0]
        response_ids = np.asarray(completion.token_ids, np.int32)
        found = completion.logprobs
        if isinstance(found, FlatLogprobs):
            wish = RowRequest(
                rows=np.arange(len(response_ids), dtype=np.int32),
                targets=response_ids,
                vocab_size=plan.output_vocab_size,
                top_k=plan.top_k,
                num_draws=plan.num_draws or 0,
                seed=draw_seed(plan.seed, request.sample_id, number),
            )
            rows = from_flat(found, wish, wish.rows, plan, request.where)
        elif isinstance(found, CapturedSamplerSteps):
            rows = found.rows()
        else:
            raise ModelError(f"{request.where}: vLLM returned no scores")
        return GeneratedResponse(number, response_ids, to_scores(rows, plan, request.where))

    def _wish(self, request: ScoreRequest, expanded_ids: list[int]) -> RowRequest:
        positions_R = expanded_positions(np.asarray(expanded_ids, np.int32), request.encoded, request.where)
        return RowRequest(
            rows=predicting_positions(positions_R).astype(np.int32),
            targets=request.encoded.response_ids.astype(np.int32),
            vocab_size=self._plan.output_vocab_size,
            top_k=self._plan.top_k,
            num_draws=self._plan.num_draws or 0,
            seed=draw_seed(self._plan.seed, request.sample_id, request.key[1]),
        )

    def _rows(self, output: RequestOutput, request: ScoreRequest) -> CapturedRows:
        assert output.prompt_token_ids is not None
        found = output.prompt_logprobs
        if isinstance(found, CapturedRows):
            rows = found
        elif isinstance(found, FlatLogprobs):
            wish = self._wish(request, output.prompt_token_ids)
            # vLLM's entry i is the distribution that token i is drawn from, one place behind the one that predicts it.
            rows = from_flat(found, wish, wish.rows + 1, self._plan, request.where)
        else:
            raise ModelError(f"{request.where}: vLLM returned no scores")
        num_scored = len(request.encoded.response_ids)
        if len(rows.own) != num_scored:
            raise ModelError(f"{request.where}: vLLM returned {len(rows.own)} rows for {num_scored} scored tokens")
        return rows


def draw_seed(seed: int, sample_id: str, conversation: int) -> str:
    """Seed of all that is drawn for a conversation, 128 bits in hexadecimal; other runs give the same."""
    return hashlib.sha256(f"{seed}\0{sample_id}\0{conversation}".encode()).hexdigest()[:32]


def to_scores(rows: CapturedRows, plan: ScorerSettings, where: str) -> TeacherScores:
    """What the engine captured, as it is stored.

    Entries at or past the tokenizer's vocabulary are padding of the output layer: they are left out, and so counted in
    the rest mass.

    Raises:
        ModelError: an own log-prob is not finite.
    """
    if not np.isfinite(rows.own).all():
        raise ModelError(
            f"{where}: the teacher gives a response token the log-prob "
            f"{rows.own[~np.isfinite(rows.own)][0]}; its weights or engine.dtype are at fault"
        )
    if plan.num_draws:
        return scores_from_draws(rows.own, rows.drawn, vocab_size=plan.vocab_size)
    kept_RK = rows.logprobs
    if plan.vocab_size < plan.output_vocab_size:
        kept_RK = np.where(rows.ids < plan.vocab_size, kept_RK, -np.inf)
    return scores_from_topk(rows.own, rows.ids, kept_RK, top_p=plan.top_p, min_k=plan.min_k)


def from_flat(
    flat: FlatLogprobs, wish: RowRequest, places_R: npt.NDArray[np.int32], plan: ScorerSettings, where: str
) -> CapturedRows:
    """The wanted rows out of vLLM's own log-probs, where they stand at `places_R`.

    An entry's first value is the log-prob of the token that stands there, the others are the best ones in descending
    order; for draws they are the whole vocabulary, of which the same are drawn as in the engine.

    Raises:
        ModelError: the rows are not those of the response tokens.
    """
    if len(flat) <= places_R[-1]:
        raise ModelError(f"{where}: vLLM returned {len(flat)} rows, row {places_R[-1]} is wanted")
    runs = np.split(places_R, np.flatnonzero(np.diff(places_R) != 1) + 1)
    ranges = [(flat.start_indices[run[0]], flat.end_indices[run[-1]]) for run in runs]
    ids = np.concatenate([np.asarray(flat.token_ids[start:stop], np.int32) for start, stop in ranges])
    logprobs = np.concatenate([np.asarray(flat.logprobs[start:stop], np.float32) for start, stop in ranges])
    ids_RK = ids.reshape(len(places_R), -1)
    logprobs_RK = logprobs.reshape(ids_RK.shape)
    if not np.array_equal(ids_RK[:, 0], wish.targets):
        raise ModelError(f"{where}: the rows that vLLM returned are not those of the response tokens")
    own_R, ids_RK, logprobs_RK = logprobs_RK[:, 0].copy(), ids_RK[:, 1:], logprobs_RK[:, 1:]
    if not wish.num_draws:
        return CapturedRows(own_R, ids_RK, logprobs_RK, ids_RK[:, :0])
    drawn = draw_from_distributions(ids_RK, logprobs_RK, request_uniforms(wish))
    return CapturedRows(own_R, ids_RK[:, :0], logprobs_RK[:, :0], drawn)


def expanded_positions(expanded_ids: npt.NDArray[np.int32], encoded: EncodedChat, where: str) -> npt.NDArray[np.int64]:
    """Where the scored tokens stand in the engine's sequence, int64 [R].

    However many placeholders an image became, the tokens between images are the same on both sides.

    Raises:
        ModelError: they are not.
    """
    image_token_id = -1 if encoded.image_token_id is None else encoded.image_token_id
    own_text = np.flatnonzero(encoded.input_ids != image_token_id)
    expanded_text = np.flatnonzero(expanded_ids != image_token_id)
    if not np.array_equal(encoded.input_ids[own_text], expanded_ids[expanded_text]):
        raise ModelError(
            f"{where}: vLLM read {len(expanded_text)} text tokens that are not the conversation's {len(own_text)}; "
            "this model's image tokens cannot be aligned"
        )
    return expanded_text[np.searchsorted(own_text, encoded.response_positions)]


def _stock_logprobs(plan: ScorerSettings) -> int:
    """Entries to ask vLLM's own way for: all of them (-1) where the program draws from them itself."""
    return -1 if plan.num_draws else plan.top_k
