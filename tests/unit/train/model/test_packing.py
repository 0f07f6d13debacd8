"""Tests of packed samples: each has the outputs that it has alone, and training equals that of padded batches."""

import collections
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    modeling_flash_attention_utils,
)

from common.data.chat_encoding import ChatEncoder
from common.data.samples import Kind
from common.errors import ConfigError
from demo.families import build_text_model
from tests.integration.training.test_parallel import make_sparse
from tests.support.models import TextFamily, randomise, tiny_causal_lm, tiny_llava
from tests.support.training import LiveTeacher, largest_difference, run_stages, stage, weights, write_mixed_dataset
from tests.support.training import losses as logged_losses
from train.config import LossConfig, MoEConfig, TrainConfig
from train.data.collator import Batch, Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import Example, ShardSource
from train.loss.fused_output import FusedOutput
from train.loss.objective import compute_terms, step_loss, unit_counts
from train.model.packing import ATTENTIONS, TEXT_MODELS, check_packing_supported
from train.model.student import load_student, text_config
from train.moe.router_monitor import RouterMonitor
from train.moe.upcycle import is_sparse, upcycle
from train.run.stage import prepare_student

# Sequences of one token at the start, in the middle and at the end, several of them in a row, and one sequence alone.
LENGTHS = [[5], [1], [1, 4, 3], [4, 1, 1, 6, 1]]

# Family and settings of each text model.
STUDENTS: dict[str, tuple[TextFamily, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "mistral, window": ("mistral", {"sliding_window": 3}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {}),
}
# Families and settings of text models that `demo.families` makes.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": 3}),
    "smollm3": ("smollm3", {}),
    "stablelm": ("stablelm", {}),
}


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    root = tmp_path_factory.mktemp("students")
    models = {}
    for name, (family, settings) in STUDENTS.items():
        path = tiny_causal_lm(root / name, family, num_layers=2, **settings)
        model = load_student(path, dtype=torch.float32)
        if name.endswith("_moe"):
            model = upcycle(model, MoEConfig(layers="all"), seed=0)
            randomise(((n, p) for n, p in model.named_parameters() if ".mlp.experts." in n or ".gate." in n), 1, 0.3)
        models[name] = model
    for name, (other, settings) in OTHERS.items():
        texts = ["user\nIs it the digit?", "assistant\nIt is the digit."] * 9
        build_text_model(other, root / name, texts, seed=0, sizes=settings)
        models[name] = load_student(root / name, dtype=torch.float32)
    return models


def packed_inputs(sequences: list[Tensor]) -> dict[str, Any]:
    return {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(each)) for each in sequences])[None],
        "attention_mask": None,
        "use_cache": False,
    }


def plain_attention(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, scale: float, window: int | None) -> Tensor:
    """Returns the causal attention of one sequence, written out."""
    groups = q_NHD.shape[1] // k_NHD.shape[1]
    k_NHD, v_NHD = k_NHD.repeat_interleave(groups, 1), v_NHD.repeat_interleave(groups, 1)
    scores_HNN = torch.einsum("qhd,khd->hqk", q_NHD, k_NHD) * scale
    distance_NN = torch.arange(len(q_NHD))[:, None] - torch.arange(len(q_NHD))
    visible_NN = (distance_NN >= 0) & (distance_NN < (len(q_NHD) if window is None else window))
    return torch.einsum("hqk,khd->qhd", scores_HNN.masked_fill(~visible_NN, -torch.inf).softmax(-1), v_NHD)


class FakeFlashAttention:
    """Replaces flash-attn, which needs a GPU: its two functions as documented, and the lengths of their calls."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []

    def __call__(self, _name: str | None) -> tuple[Any, Any]:
        supports = collections.defaultdict(bool, window_size=True, max_seqlen_q=True, max_seqlen_k=True)
        process = modeling_flash_attention_utils._process_flash_attention_kwargs  # noqa: SLF001 - what it replaces uses it
        settings = functools.partial(process, supports_mapping=supports)
        return (self.whole, self.varlen, None, None, None), (settings, None)

    def whole(self, q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
        return torch.stack([self._attend(*one, **settings) for one in zip(q, k, v, strict=True)])

    def varlen(  # noqa: PLR0913 - flash-attn's signature
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **settings: Any,
    ) -> Tensor:
        lengths = cu_seqlens_q.diff().tolist()
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
        assert max(lengths) == max_seqlen_q == max_seqlen_k
        self.lengths.append(lengths)
        parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        return torch.cat([self._attend(*part, **settings) for part in parts])

    @staticmethod
    def _attend(  # noqa: PLR0913 - flash-attn's signature
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float, window_size: tuple[int, int] = (-1, -1)
    ) -> Tensor:
        assert causal
        return plain_attention(q, k, v, softmax_scale, None if window_size[0] < 0 else window_size[0] + 1)


@pytest.fixture
def flash_attention(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention:
    fake = FakeFlashAttention()
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", fake)
    return fake


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", [*STUDENTS, *OTHERS])
def test_packed_sequences_have_the_logits_that_each_has_alone(
    students: dict[str, PreTrainedModel],
    name: str,
    attention: str,
    flash_attention: FakeFlashAttention,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = students[name]
    generator = torch.Generator().manual_seed(0)
    for lengths in LENGTHS:
        sequences = list(torch.randint(290, (sum(lengths),), generator=generator).split(lengths))
        with torch.no_grad():
            alone = [model(input_ids=each[None]).logits[0] for each in sequences]
            with monkeypatch.context() as patch:
                patch.setattr(model.config, "_attn_implementation_internal", attention)
                check_packing_supported(model)
                together = model(**packed_inputs(sequences)).logits[0].split(lengths)
                for number, expected in enumerate(alone):
                    assert (together[number] - expected).abs().max() < 1e-5
                    changed = [each.clone() for each in sequences]
                    changed[number][0] += 1
                    for other, found in enumerate(model(**packed_inputs(changed)).logits[0].split(lengths)):
                        difference = (found - together[other]).abs().max()
                        assert difference > 0.01 if other == number else difference < 1e-5
        if attention == "flash_attention_2" and len(lengths) > 1:
            assert flash_attention.lengths[-1] == lengths


@pytest.mark.parametrize("change", [{"attention_mask": True}, {"use_cache": True}])
def test_with_a_mask_or_a_cache_the_same_comparison_fails(
    students: dict[str, PreTrainedModel], change: dict[str, bool]
) -> None:
    sequences = list(torch.arange(12).split([5, 7]))
    inputs = packed_inputs(sequences) | change
    if change.get("attention_mask"):
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        alone = students["qwen2"](input_ids=sequences[1][None]).logits[0]
        assert (students["qwen2"](**inputs).logits[0, 5:] - alone).abs().max() > 0.1


def test_every_accepted_text_model_was_compared(students: dict[str, PreTrainedModel]) -> None:
    # Those of models that take images are compared in test_vision_language_students.py.
    others = {name for name in TEXT_MODELS if name.endswith("_text")}
    assert {text_config(model).model_type for model in students.values()} == set(TEXT_MODELS) - others


def test_other_models_and_other_attention_are_refused(
    students: dict[str, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20))
    with pytest.raises(
        ConfigError, match=r"text model is gpt2, expected one of llama, .*samples do not see each other"
    ):
        check_packing_supported(gpt2)
    monkeypatch.setattr(students["llama"].config, "_attn_implementation_internal", "flex_attention")
    with pytest.raises(
        ConfigError, match=r"attention is flex_attention, expected one of sdpa, eager, flash_attention_2"
    ):
        check_packing_supported(students["llama"])


# Whole batches


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("packing")
    tiny_llava(root / "dense", num_layers=2)
    tiny_llava(root / "other", num_layers=2, seed=1)
    make_sparse(root / "dense", root / "sparse")
    kinds: tuple[Kind, ...] = ("kd", "dpo")
    for kind in kinds:
        dataset = write_mixed_dataset(root / "data", 22, kind)
        LiveTeacher(root / "dense", root / "data").write_output(root / kind, dataset, kind, top_k=5)
    return root


def read_examples(root: Path, kind: Kind, numbers: range | list[int]) -> list[Example]:
    source = ShardSource(root / kind, ChatEncoder.load(root / "dense"), "pad", 4)
    return [source[i] for i in numbers]


def padded_and_packed(root: Path, kind: Kind, numbers: range | list[int]) -> tuple[Batch, Batch]:
    """Returns the batch of the same samples, padded and packed."""
    encoder = ChatEncoder.load(root / "dense")
    images = ImageCache.load(root / "dense", "pad")
    student = StudentInputs(images, encoder.image_token_id, encoder.tokenizer.pad_token_id)
    settings: dict[str, Any] = {"kind": kind, "image_root": root / "data", "max_tokens": 512}
    examples = read_examples(root, kind, numbers)
    return Collator(student, **settings)(examples), Collator(student, **settings, packed=True)(examples)


# Samples with and without an image, one image in several samples, text alone (with a dummy at the end), and no sample
# (only a dummy).
BATCHES: list[list[int]] = [[0, 1, 2, 3, 4], [1, 3, 0, 5], [1, 3], [0], []]


@pytest.mark.slow
@pytest.mark.parametrize("numbers", BATCHES)
@pytest.mark.parametrize("kind", ["kd", "dpo"])
def test_a_packed_batch_is_the_padded_one_without_its_padding(root: Path, kind: Kind, numbers: list[int]) -> None:
    padded, found = padded_and_packed(root, kind, numbers)
    assert padded.attention_mask is not None
    filled = padded.attention_mask.bool()
    assert found.attention_mask is None
    assert found.position_ids is not None
    assert found.input_ids.shape == found.position_ids.shape == found.token_mask.shape == (1, int(filled.sum()))
    assert torch.equal(found.input_ids[0], padded.input_ids[filled])
    assert torch.equal(found.token_mask[0], padded.token_mask[filled])
    positions = torch.arange(filled.shape[1]).expand_as(filled)
    assert torch.equal(found.position_ids[0], positions[filled])
    assert (found.position_ids == 0).sum() == found.num_sequences == padded.num_sequences == len(padded.input_ids)
    assert torch.equal(found.input_ids[0, found.rows + 1], found.targets)
    names = ("targets", "row_sequence", "topk_ids", "topk_logprobs", "rest_mass", "reference_logprobs")
    for name in names:
        assert torch.equal(getattr(found, name), getattr(padded, name)), name
    assert torch.equal(found.images["pixel_values"], padded.images["pixel_values"])
    assert torch.equal(found.image_mask[0], padded.image_mask[filled])
    assert found.num_padding == 0
    assert padded.num_padding == (~filled).sum()
    counts = unit_counts(padded) | {"positions": int(filled.sum())}
    assert unit_counts(found) == counts


@pytest.mark.slow
@pytest.mark.parametrize("numbers", BATCHES[:4])
def test_images_and_dummies_stay_within_their_segment(root: Path, numbers: list[int]) -> None:
    model = LiveTeacher(root / "dense", root / "data")
    _, batch = padded_and_packed(root, "kd", numbers)
    with torch.no_grad():
        logits = model.model(**batch.model_inputs).logits[0, batch.rows]
    start = 0
    for example in read_examples(root, "kd", numbers):
        encoded, alone = model.logprobs(example.sample, 0)
        stop = start + len(encoded.response_ids)
        vocab_size = model.encoder.vocab_size
        found = logits[start:stop, :vocab_size].log_softmax(-1)
        assert (found - alone[:, :vocab_size]).abs().max() < 1e-5
        start = stop
    assert start == batch.num_rows


LOSSES: dict[str, tuple[str, Kind, LossConfig]] = {
    "distilled": ("other", "kd", LossConfig(distillation=1.0, cross_entropy=0.5)),
    "distilled, sparse": ("sparse", "kd", LossConfig(distillation=1.0, balance=0.1, router_z=0.1)),
    "preferred": ("other", "dpo", LossConfig(preference=1.0)),
    "preferred, by length": ("sparse", "dpo", LossConfig(preference=1.0, preference_type="ipo", balance=0.1)),
    "kto_pair": ("other", "dpo", LossConfig(preference=1.0, preference_type="kto_pair", length_normalised=True)),
}


def terms_and_gradient(model: PreTrainedModel, batch: Batch, config: LossConfig) -> tuple[dict[str, float], Tensor]:
    """Returns the loss with each of its terms, and the gradient of all parameters in one tensor."""
    output = FusedOutput(model, vocab_size=293)
    router = RouterMonitor(model) if is_sparse(model) else None
    with output.scoring(batch, kept=config.distillation > 0):
        model(**batch.model_inputs)
        rows = output.read()
    router_logits = router.pop_router_logits() if router else ()
    terms = compute_terms(rows, batch, config, vocab_size=293, router_logits=router_logits, router_top_k=2)
    loss = step_loss(terms, unit_counts(batch))
    loss.backward()
    found = {name: term.total.item() for name, term in terms.items() if term.weight} | {"loss": loss.item()}
    return found, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [*((name, False) for name in LOSSES), ("distilled, sparse", True), ("preferred", True)],
)
def test_terms_and_gradient_are_those_of_the_padded_batch(root: Path, name: str, checkpointing: bool) -> None:
    student, kind, config = LOSSES[name]
    results = []
    for batch in padded_and_packed(root, kind, range(6)):
        model = load_student(root / student, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        results.append(terms_and_gradient(model, batch, config))
    (expected, gradient), (terms, found) = results
    # A preference loss is a function of small differences between large sums.
    assert terms == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (found - gradient).norm() < 1e-6 * gradient.norm()


# Whole runs

PADDED: dict[str, Any] = {}
PACKED = {"batching": "packed"}
GROUPED = {"group_by_length": True}
RUNS = {
    "kd-padded": PADDED,
    "kd-packed": PACKED,
    "kd-grouped": GROUPED,
    "dpo-padded": PADDED,
    "dpo-packed": PACKED | GROUPED,
}


@pytest.fixture(scope="module")
def runs(root: Path) -> Path:
    for num_ranks in (1, 2):
        configs = [
            stage(
                root / f"{name}-{num_ranks}",
                root / "sparse",
                trainable=["adapter", "language_model"],
                data={"shards": str(root / name.split("-")[0]), "image_root": str(root / "data"), **data},
                # Without the balance loss, because it depends on which samples share a micro-batch.
                loss={"preference" if name.startswith("dpo") else "distillation": 1.0, "router_z": 0.01},
                optim={"max_steps": 3},
                run={"zero_stage": 2, "activation_checkpointing": name.startswith("kd")},
            )
            for name, data in RUNS.items()
        ]
        run_stages(configs, root / "scratch", num_ranks)
    return root


def padding_fractions(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["padding_fraction"] for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_with_the_same_weights_for_any_batching(runs: Path, name: str, num_ranks: int) -> None:
    reference, found = runs / f"{name.split('-')[0]}-padded-1", runs / f"{name}-{num_ranks}"
    assert logged_losses(found) == pytest.approx(logged_losses(reference), rel=2e-6)
    # The steps are of 1e-3.
    assert largest_difference(weights(found), weights(reference)) < 5e-6
    padding = padding_fractions(found)
    assert len(padding) == 3
    if name.endswith("packed"):
        assert padding == [0, 0, 0]
    elif name.endswith("grouped"):
        assert 0 < sum(padding) < 0.9 * sum(padding_fractions(reference))
    else:
        assert padding == pytest.approx(padding_fractions(reference)) and min(padding) > 0.1


def test_a_student_that_would_leak_is_refused_before_training(tmp_path: Path) -> None:
    path = tiny_causal_lm(tmp_path / "model", num_layers=1)
    config = stage(tmp_path, path, data={"dataset": "x", "batching": "packed"}, loss={"cross_entropy": 1.0})
    assert prepare_student(TrainConfig.model_validate(config)).config.model_type == "qwen2"
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=20))
    gpt2.save_pretrained(path)
    with pytest.raises(ConfigError, match="the student's text model is gpt2"):
        prepare_student(TrainConfig.model_validate(config))
