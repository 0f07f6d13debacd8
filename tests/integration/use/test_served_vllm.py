"""An exported sparse student answers through vLLM's and transformers' servers as it does in `decant chat`."""

import base64
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image

from common.data.samples import Turn
from tests.support.models import randomise, tiny_causal_lm, tiny_llava
from train.commands import export
from train.config import MoEConfig
from train.model.compose import compose_student
from train.model.student import load_student, save_student
from train.moe.upcycle import upcycle_directory
from use.chat_model import ChatModel, Sampling

pytestmark = pytest.mark.vllm

QUESTION = "what about word1?"
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    tiny_llava(root / "clip")
    tiny_causal_lm(root / "lm", "qwen2", image_token=False)
    compose_student(root / "clip", root / "lm", root / "dense", seed=0)
    upcycle_directory(root / "dense", root / "upcycled", MoEConfig(num_experts=4, top_k=2, noise=0.5), seed=0)
    model = load_student(root / "upcycled", dtype=torch.float32)
    randomise(((n, p) for n, p in model.named_parameters() if "multi_modal_projector" in n), 1, std=0.5)
    # Bytes that are no text would be shown in different ways.
    tokenizer = ChatModel(root / "dense")._encoder.tokenizer  # noqa: SLF001 - the tokenizer as a student has it
    with torch.no_grad():
        output = model.get_output_embeddings().weight
        for token_id in range(len(output)):
            text = tokenizer.decode([token_id]) if token_id < len(tokenizer) else ""
            if not (text.isascii() and text.strip().isalnum()):
                output[token_id] = 0
    save_student(model, root / "upcycled", root / "sparse")
    export(root / "sparse", root / "exported")
    pixels = torch.randint(0, 255, (30, 70, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    Image.fromarray(pixels.numpy()).save(root / "a.png")
    return root / "exported"


@contextmanager
def served(command: list[str], log: Path) -> Iterator[OpenAI]:
    """Runs a server until the block ends; nothing of it is left then."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        until = time.monotonic() + 240
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120, max_retries=0)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except urllib.error.HTTPError as error:
        # transformers' server may not know this path.
        return error.code == 404
    except OSError:
        return False


def ask(client: OpenAI, model: str, image: Path | None) -> str:
    """Returns a streamed answer to a question of content parts."""
    parts: list[Any] = [{"type": "text", "text": QUESTION}]
    if image is not None:
        data = base64.b64encode(image.read_bytes()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}})
    chunks = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": parts}],
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def expected_answer(student: Path, image: Path | None) -> str:
    turns = [Turn("user", QUESTION if image is None else f"<image>\n{QUESTION}")]
    return "".join(ChatModel(student).answer(turns, [] if image is None else [image], Sampling(NUM_TOKENS)))


# `vllm serve` starts this module; the command itself wants a package named vllm, which the build for CPUs is not.
VLLM = "vllm.entrypoints.openai.api_server --model {} --dtype float32 --enforce-eager --max-model-len 256"
SERVERS = {"vllm": VLLM, "transformers": "transformers.cli.transformers serve {} --dtype float32 --device cpu"}


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_answers_as_the_student_does_in_chat(student: Path, tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-m", *(argument.format(student) for argument in SERVERS[name].split())]
    image = student.parent / "a.png"
    expected = [expected_answer(student, each) for each in (None, image)]
    assert expected[0] != expected[1]
    # transformers' server decodes images with torchvision's extension, which its build for CPUs here has not.
    questions = (None, image) if name == "vllm" else (None,)
    with served(command, tmp_path / "log") as client:
        found = [ask(client, str(student), each) for each in questions]
    assert found == expected[: len(found)]
