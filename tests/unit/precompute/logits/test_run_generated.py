"""Rows of responses that a fake teacher writes."""

from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np

from common.data.chat_encoding import ChatEncoder, EncodedChat
from common.shards.manifest import SkippedSample
from precompute.logits.run import run_capture
from precompute.scorer import GeneratedResponse, RejectedRequest, RequestKey, ScoreRequest, ScoringResult
from precompute.verify.logits import verify_logits
from tests.support.fake_teacher import FakeTeacher, conversation_records, make_config
from tests.support.outputs import read_all_rows

NUM_RESPONSES = 3


class WritingTeacher(FakeTeacher):
    """Writes responses of one to three tokens, the last response first; rejects the prompt of sample 2."""

    def score(self, requests: Iterable[ScoreRequest]) -> Generator[tuple[RequestKey, ScoringResult], None, None]:
        for request in requests:
            if request.key[0] == 2:
                yield request.key, RejectedRequest("too strange")
                continue
            for number in reversed(range(NUM_RESPONSES)):
                prompt = request.encoded.input_ids
                response = np.arange(5, 6 + number, dtype=np.int32)
                span = np.array([[len(prompt), len(prompt) + len(response)]], np.int32)
                encoded = EncodedChat(np.concatenate([prompt, response]), span, request.encoded.image_token_id)
                yield request.key, GeneratedResponse(number, response, self.make_scores(encoded, request.images))


def test_each_response_is_a_row_whose_tokens_are_all_scored(tmp_path: Path, llava_dir: Path) -> None:
    config = make_config(
        tmp_path,
        llava_dir,
        conversation_records(tmp_path, 5),
        generate={"num_samples": NUM_RESPONSES, "max_new_tokens": 3},
        on_bad_sample="skip",
    )
    summary = run_capture(config, progress=False, start_teacher=WritingTeacher)
    assert summary.skipped == (SkippedSample(index=2, id="s2", reason="too strange"),)
    assert verify_logits(config.output, config.dataset, progress=False).ok
    rows = read_all_rows(config.output)
    names = [f"s{index}#{number}" for index in (0, 1, 3, 4) for number in range(NUM_RESPONSES)]
    assert [row.sample.id for row in rows] == names
    tokenizer = ChatEncoder.load(llava_dir).tokenizer
    for row, number in zip(rows, [0, 1, 2] * 4, strict=True):
        (scored,), (turns,) = row.conversations, row.sample.conversations
        assert scored.encoded.response_ids.tolist() == list(range(5, 6 + number))
        assert scored.scores.num_rows == number + 1
        assert turns[-1].role == "assistant"
        assert turns[-1].content == tokenizer.decode(scored.encoded.response_ids, skip_special_tokens=True)
