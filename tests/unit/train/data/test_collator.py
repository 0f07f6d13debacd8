"""Tests of batches against the sequences that they were made of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data.chat_encoding import ChatEncoder
from common.data.samples import Kind
from common.errors import DataError
from tests.support.fused_rows import row_logits
from tests.support.models import tiny_llava
from tests.support.training import LiveTeacher, write_mixed_dataset
from train.config import LossConfig
from train.data.collator import Batch, Collator, StudentInputs
from train.data.image_cache import ImageCache
from train.data.sources import DatasetSource, ShardSource
from train.loss.objective import Term, compute_terms, step_loss, unit_counts


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batch")
    tiny_llava(root / "model", num_layers=2)
    kinds: tuple[Kind, ...] = ("kd", "dpo")
    for kind in kinds:
        dataset = write_mixed_dataset(root / "data", 8, kind)
        LiveTeacher(root / "model", root / "data").write_output(root / kind, dataset, kind, top_k=5)
    return root


def make_collator(root: Path, *, images: bool = True, **changes: Any) -> Collator:
    encoder = ChatEncoder.load(root / "model")
    cache = ImageCache.load(root / "model", "pad") if images else None
    student = StudentInputs(cache, encoder.image_token_id, encoder.tokenizer.pad_token_id)
    settings: dict[str, Any] = {"kind": "kd", "image_root": root / "data", "max_tokens": 512}
    return Collator(student, **{**settings, **changes})


def open_shards(root: Path, kind: Kind) -> ShardSource:
    return ShardSource(root / kind, ChatEncoder.load(root / "model"), "pad", 4)


def teacher_logits(root: Path, batch: Batch) -> torch.Tensor:
    model = LiveTeacher(root / "model", None).model
    with torch.no_grad():
        out: torch.Tensor = model(**batch.model_inputs).logits
    return out.flatten(0, 1)[batch.rows]


def terms_from_logits(logits_RV: torch.Tensor, batch: Batch, config: LossConfig, vocab_size: int) -> dict[str, Term]:
    ids_RK, filled_RK = None, None
    if config.distillation:
        assert batch.topk_logprobs is not None
        ids_RK, filled_RK = batch.topk_ids, batch.topk_logprobs > -torch.inf
    rows = row_logits(logits_RV, batch.targets, ids_RK, filled_RK, vocab_size=vocab_size)
    return compute_terms(rows, batch, config, vocab_size=vocab_size)


def test_each_row_stands_right_before_its_token(root: Path) -> None:
    examples = [open_shards(root, "kd")[i] for i in range(8)]
    batch = make_collator(root)(examples)
    assert torch.equal(batch.input_ids.flatten()[batch.rows + 1], batch.targets)
    expected = np.concatenate([example.conversations[0].response_ids for example in examples])
    assert batch.targets.tolist() == expected.tolist()
    assert len(batch.images["pixel_values"]) == 4
    assert int(batch.image_mask.sum()) == 4 * 16
    assert batch.attention_mask is not None
    assert batch.num_tokens == int(batch.attention_mask.sum())


def test_the_padded_batch_gives_each_sample_the_scores_it_has_alone(root: Path) -> None:
    examples = [open_shards(root, "kd")[i] for i in range(8)]
    batch = make_collator(root)(examples)
    own = teacher_logits(root, batch)[:, :293].log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    alone = torch.from_numpy(np.concatenate([e.scores[0].own_logprobs for e in examples if e.scores]))
    assert torch.allclose(own, alone, atol=2e-5)


def test_the_student_that_is_the_teacher_has_no_distillation_loss(root: Path) -> None:
    batch = make_collator(root)([open_shards(root, "kd")[i] for i in range(8)])
    vocab_size = ChatEncoder.load(root / "model").vocab_size
    config = LossConfig(distillation=1.0, cross_entropy=0.5)
    terms = terms_from_logits(teacher_logits(root, batch), batch, config, vocab_size=vocab_size)
    num_rows = len(batch.targets)
    assert abs(float(terms["distillation"].total)) / num_rows < 1e-5
    other = terms_from_logits(teacher_logits(root, batch).roll(1, 0), batch, config, vocab_size=vocab_size)
    assert float(other["distillation"].total) / num_rows > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 3, 5])
def test_the_loss_of_a_step_does_not_depend_on_its_micro_batches(root: Path, cut: int) -> None:
    examples = [open_shards(root, "kd")[i] for i in range(8)]
    config = LossConfig(distillation=1.0, cross_entropy=1.0)

    def collate(*groups: Any) -> list[Batch]:
        return [make_collator(root)(group) for group in groups]

    def loss(batches: list[Batch]) -> float:
        counts = {unit: sum(unit_counts(batch)[unit] for batch in batches) for unit in ("rows", "pairs", "tokens")}
        terms = [terms_from_logits(teacher_logits(root, batch), batch, config, vocab_size=293) for batch in batches]
        return sum(float(step_loss(t, counts)) for t in terms)

    assert loss(collate(examples[:cut], examples[cut:], [])) == pytest.approx(loss(collate(examples)), rel=1e-6)


def test_dummies_have_no_scored_row_and_no_real_token(root: Path) -> None:
    make = make_collator(root)
    text_only = make([open_shards(root, "kd")[1]])
    assert len(text_only.images["pixel_values"]) == 1
    assert text_only.image_mask[1, :16].all()
    assert text_only.num_sequences == 2
    assert not text_only.token_mask[1].any()
    assert text_only.num_padding == text_only.input_ids.numel() - text_only.num_tokens - 16
    empty = make([])
    assert unit_counts(empty) == {"rows": 0, "pairs": 0, "tokens": 0, "positions": 16}
    assert empty.num_sequences == 1


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "kto_pair"])
def test_a_rank_without_a_pair_has_the_same_terms_and_a_graph(root: Path, loss_type: Any) -> None:
    make = make_collator(root, kind="dpo")
    config = LossConfig(preference=1.0, preference_type=loss_type)
    full, empty = make([open_shards(root, "dpo")[0]]), make([])
    logits_RV = torch.randn(0, 306, requires_grad=True)
    terms = terms_from_logits(logits_RV, empty, config, vocab_size=293)
    assert terms.keys() == terms_from_logits(teacher_logits(root, full), full, config, vocab_size=293).keys()
    loss = step_loss(terms, {"rows": 4, "pairs": 2, "tokens": 9})
    assert float(loss) == 0.0
    loss.backward()
    assert logits_RV.grad is not None


def test_preference_terms_come_from_the_summed_log_probs(root: Path) -> None:
    examples = [open_shards(root, "dpo")[i] for i in range(8)]
    batch = make_collator(root, kind="dpo")(examples)
    assert batch.num_pairs == 8
    assert batch.reference_logprobs is not None
    config = LossConfig(preference=1.0, beta=0.3)
    terms = terms_from_logits(teacher_logits(root, batch), batch, config, vocab_size=293)
    # Policy and reference are the same model, so every reward is 0 and the loss is log 2.
    assert float(terms["preference"].total) == pytest.approx(8 * np.log(2), rel=1e-5)
    assert float(terms["rewards/margins"].total) == pytest.approx(0.0, abs=1e-3)
    shifted = replace(batch, reference_logprobs=batch.reference_logprobs - torch.tensor([1.0] * 8 + [0.0] * 8))
    terms = terms_from_logits(teacher_logits(root, shifted), shifted, config, vocab_size=293)
    assert float(terms["rewards/chosen"].total) == pytest.approx(8 * 0.3, rel=1e-4)
    assert float(terms["preference"].total) == pytest.approx(8 * np.log1p(np.exp(-0.3)), rel=1e-4)
    assert float(terms["rewards/accuracies"].total) == 8


def test_errors_of_length_and_images_name_the_sample(root: Path) -> None:
    example = DatasetSource(root / "data" / "kd.json", "kd", ChatEncoder.load(root / "model"))[0]
    with pytest.raises(DataError, match=r"sample 's0'.* tokens for this student.*max_tokens is 20"):
        make_collator(root, max_tokens=20)([example])
    with pytest.raises(DataError, match="sample 's0': has images, but the student has no vision tower"):
        make_collator(root, images=False)([example])
    with pytest.raises(DataError, match=r"does not exist; check image_root"):
        make_collator(root, image_root=root)([example])


def test_an_empty_batch_of_a_text_student_is_a_dummy_of_padding(root: Path) -> None:
    batch = make_collator(root, images=False)([])
    assert batch.input_ids.tolist() == [[ChatEncoder.load(root / "model").tokenizer.pad_token_id] * 2]
    assert not batch.images
    assert not batch.token_mask.any()


def test_a_batch_moves_with_all_of_its_tensors(root: Path) -> None:
    batch = make_collator(root)([open_shards(root, "kd")[0]])
    moved = batch.to(torch.device("meta"))
    assert moved.sample_ids == batch.sample_ids
    tensors = {name for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    assert {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and value.is_meta} == tensors
