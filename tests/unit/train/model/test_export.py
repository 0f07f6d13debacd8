"""Tests of exported students: every weight, the names that vLLM reads, and directories that are refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from common.data.portable_template import original_template
from common.errors import ModelError, StorageError
from tests.support.models import TextFamily, randomise, tiny_causal_lm, tiny_llava
from train.config import MoEConfig
from train.model import export as export_module
from train.model.export import export_student
from train.model.student import load_student, save_student
from train.moe.upcycle import upcycle

F32 = torch.float32


def sparse_student(directory: Path, text: TextFamily = "qwen2", tied: bool = True) -> Path:
    """Writes a sparse LLaVA whose experts and routers all differ, as after training."""
    dense = tiny_llava(directory / "dense", text, tied=tied)
    model = upcycle(load_student(dense, dtype=F32), MoEConfig(), seed=0)
    redrawn = [(n, p) for n, p in model.named_parameters() if ".mlp.experts." in n or ".mlp.gate." in n]
    randomise(redrawn, seed=1)
    save_student(model, dense, directory / "sparse")
    return directory / "sparse"


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_student(tmp_path_factory.mktemp("student"))


@pytest.fixture
def checkpoint(student: Path, tmp_path: Path) -> Path:
    """Makes a trainer's checkpoint directory: the model in a subdirectory, beside states of the optimizer."""
    shutil.copytree(student, tmp_path / "checkpoint-7" / "model")
    (tmp_path / "checkpoint-7" / "global_step7").mkdir()
    (tmp_path / "checkpoint-7" / "global_step7" / "zero_pp_rank_0.pt").write_bytes(b"state")
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text("{}")
    return tmp_path / "checkpoint-7"


def test_every_tensor_of_a_checkpoint_is_exported_unchanged(checkpoint: Path, tmp_path: Path) -> None:
    export_student(checkpoint, tmp_path / "out")
    expected, found = (
        load_file(checkpoint / "model" / "model.safetensors"),
        load_file(tmp_path / "out/model.safetensors"),
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_the_exported_directory_holds_a_model_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    export_student(checkpoint, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (checkpoint / "model" / name).read_bytes()
    templates = [(path / "chat_template.jinja").read_text() for path in (tmp_path / "out", checkpoint / "model")]
    assert original_template(templates[0]) == original_template(templates[1])
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id is not None
    assert not list(tmp_path.glob(".*"))


def test_weights_carry_the_names_that_vllm_reads(student: Path, tmp_path: Path) -> None:
    export_student(student, tmp_path / "out")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {
        "language_model",
        "multi_modal_projector",
        "vision_tower",
    }
    assert "vision_tower.vision_model.pre_layrnorm.weight" in names
    assert "language_model.model.layers.1.mlp.experts.3.down_proj.weight" in names
    assert "language_model.model.layers.1.mlp.gate.weight" in names


def test_a_checkpoint_in_transformers_own_key_names_is_exported_too(student: Path, tmp_path: Path) -> None:
    """The trainer may save a model that was not loaded under the older names."""
    model = load_student(student, dtype=F32)
    save_student(model, student, tmp_path / "new")
    weights = model.state_dict()
    weights.pop("lm_head.weight")  # tied
    save_file(weights, tmp_path / "new" / "model.safetensors", metadata={"format": "pt"})
    export_student(tmp_path / "new", tmp_path / "out")
    expected, found = (
        load_file(student / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_bfloat16_stays_bfloat16(student: Path, tmp_path: Path) -> None:
    save_student(load_student(student, dtype=torch.bfloat16), student, tmp_path / "half")
    export_student(tmp_path / "half", tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_are_widened_without_loss(student: Path, tmp_path: Path) -> None:
    shutil.copytree(student, tmp_path / "mixed")
    weights = load_file(student / "model.safetensors")
    mixed = {name: t if ".mlp.gate." in name else t.bfloat16() for name, t in weights.items()}
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    export_student(tmp_path / "mixed", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in mixed.items())


def test_a_text_model_is_exported(tmp_path: Path) -> None:
    text = tiny_causal_lm(tmp_path / "lm", "llama")
    export_student(text, tmp_path / "out")
    found, expected = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", text))
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_the_export_loads_without_this_project(student: Path, tmp_path: Path) -> None:
    export_student(student, tmp_path / "out")
    model, report = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor(text="<image>what", images=Image.new("RGB", (56, 56)), return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="found 0 model directories"):
        export_student(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_directory_with_several_models_is_refused(student: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(student, tmp_path / "run" / name)
    with pytest.raises(ModelError, match="found 2 model directories \\(checkpoint-1, checkpoint-2\\)"):
        export_student(tmp_path / "run", tmp_path / "out")


def test_the_final_model_of_a_stages_output_is_exported(student: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-1", "final"):
        shutil.copytree(student, tmp_path / "stage" / name)
    (tmp_path / "stage" / "config.json").write_text('{"config": {}}')
    weights = load_file(student / "model.safetensors")
    weights["multi_modal_projector.linear_1.bias"] += 1
    save_file(weights, tmp_path / "stage" / "final" / "model.safetensors", metadata={"format": "pt"})
    export_student(tmp_path / "stage", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())


def test_an_output_that_is_not_empty_is_left_unchanged(student: Path, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty"):
        export_student(student, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_empty_output_directory_is_used(student: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_student(student, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_tensor_that_reads_back_differently_stops_the_export(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_with_a_changed_weight(model: torch.nn.Module, assets_from: Path, out: Path) -> None:
        save_student(model, assets_from, out)
        weights = load_file(out / "model.safetensors")
        weights["multi_modal_projector.linear_1.bias"][0] += 1e-6
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_module, "save_student", save_with_a_changed_weight)
    with pytest.raises(StorageError, match=r"1 tensors read back otherwise.*linear_1\.bias"):
        export_student(student, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


PROMPTS = (
    "<|im_start|>user\n<image>\nWhich digit is it?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nthe image is a digit<|im_end|>\n<|im_start|>assistant\n",
)

# In a process of its own, because an engine leaves global state behind.
GENERATE = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

model, image, with_image, text_only = sys.argv[1:]
llm = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=256, enable_prefix_caching=False)
outputs = llm.generate(
    [{"prompt": with_image, "multi_modal_data": {"image": Image.open(image)}}, {"prompt": text_only}],
    SamplingParams(max_tokens=24, temperature=0, logprobs=1, ignore_eos=True),
)
completions = [output.outputs[0] for output in outputs]
found = [[list(c.token_ids), [step[t].logprob for t, step in zip(c.token_ids, c.logprobs)]] for c in completions]
print("FOUND" + json.dumps(found))
"""


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_continues_as_transformers_does(tmp_path: Path) -> None:
    """Llama's student tests the most: zero biases, a zero shared expert, experts that all differ."""
    export_student(sparse_student(tmp_path, "llama", tied=False), tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")

    run = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path / "out"), str(tmp_path / "image.png"), *PROMPTS],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
    found = json.loads(line.removeprefix("FOUND"))

    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=F32)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    for prompt, image, (ids, logprobs) in zip(PROMPTS, (tmp_path / "image.png", None), found, strict=True):
        images = None if image is None else Image.open(image)
        inputs = processor(text=prompt, images=images, return_tensors="pt")
        output = model.generate(
            **inputs,
            max_new_tokens=24,
            min_new_tokens=24,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        assert ids == output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        expected = [step[0].log_softmax(-1)[i].item() for step, i in zip(output.logits, ids, strict=True)]
        np.testing.assert_allclose(logprobs, expected, atol=1e-4)
