"""Tests of the preference losses and their metrics. Axes as in train/loss/functional.py."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import reference_losses as reference
from train.config import LossConfig
from train.data.collator import Batch
from train.loss.functional import RowLogits, preference_loss
from train.loss.objective import compute_terms

PREFERENCES = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0), ("kto_pair", 0.0)]
SHIFTS = [6.0, -6.0]  # means of the log-ratios on both sides of the clamp at 0


def random_pairs(shift: float = 0.0, num_pairs: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    reference_2P = -20 + 5 * torch.randn(2, num_pairs, generator=generator, dtype=torch.float64)
    policy_2P = reference_2P + shift + 8 * torch.randn(2, num_pairs, generator=generator, dtype=torch.float64)
    return policy_2P[0], policy_2P[1], reference_2P[0], reference_2P[1]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("loss_type", "label_smoothing"), PREFERENCES)
def test_preference_losses_agree_with_the_float64_reference(
    loss_type: Any, label_smoothing: float, shift: float
) -> None:
    pairs = [values_P.float() for values_P in random_pairs(shift)]
    chosen_P, rejected_P, reference_chosen_P, reference_rejected_P = (values_P.numpy() for values_P in pairs)
    expected = reference.preference(
        chosen_P,
        rejected_P,
        reference_chosen_P,
        reference_rejected_P,
        loss_type=loss_type,
        beta=0.1,
        label_smoothing=label_smoothing,
    )
    if loss_type == "kto_pair":
        expected = expected.reshape(2, -1).mean(0)  # so that the mean over pairs is the mean over both halves
    loss_P = preference_loss(*pairs, loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing)
    assert loss_P.dtype == torch.float32
    np.testing.assert_allclose(loss_P, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("loss_type", "label_smoothing"), PREFERENCES)
def test_preference_gradients_agree_with_finite_differences(
    loss_type: Any, label_smoothing: float, shift: float
) -> None:
    """For the paired KTO form this includes the gradient through the means that estimate the KL."""
    chosen_P, rejected_P, *references = random_pairs(shift)

    def mean_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return preference_loss(
            chosen_P, rejected_P, *references, loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing
        )

    assert torch.autograd.gradcheck(mean_loss, (chosen_P.requires_grad_(), rejected_P.requires_grad_()))


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("hinge", 1.0), ("kto_pair", 0.5)]
)
def test_the_policy_that_equals_the_reference_has_the_known_loss(loss_type: Any, expected: float) -> None:
    chosen_P, rejected_P, _, _ = random_pairs()
    loss_P = preference_loss(chosen_P, rejected_P, chosen_P, rejected_P, loss_type=loss_type, beta=0.1)
    torch.testing.assert_close(loss_P, torch.full_like(chosen_P, expected))


def test_bf16_sequence_logprobs_are_subtracted_in_float32() -> None:
    """-1000 + 0.25 is not a bf16 number, so that subtracting in bf16 would lose the quarter."""
    policy_P, reference_P = torch.tensor([-1000.0]).bfloat16(), torch.tensor([-0.25]).bfloat16()
    loss_P = preference_loss(policy_P, reference_P, reference_P, reference_P, loss_type="hinge", beta=1.0)
    assert loss_P.tolist() == [1000.75]


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing"),
    [
        ("ipo", 0.1),
        ("hinge", 0.1),
        ("kto_pair", 0.1),
        ("sigmoid", -0.1),
        ("sigmoid", 0.5),
        ("sigmoid", math.nan),
    ],
)
def test_label_smoothing_without_a_meaning_is_refused(loss_type: Any, label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is {label_smoothing}"):
        preference_loss(*random_pairs(), loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing)


def trl_preference(
    policy_logps_2PT: Tensor, reference_2P: Tensor, completion_mask_2PT: Tensor, loss_type: Any, beta: float
) -> tuple[Tensor, dict[str, list[float]]]:
    """Returns the loss and the logged metrics of TRL's own DPOTrainer for the given log-probs."""
    trl = pytest.importorskip("trl")
    metrics: dict[str, list[float]] = defaultdict(list)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda values: values, gather_for_metrics=lambda values: values
        ),
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": metrics},
        _total_train_tokens=0,
        _tp_size=1,
    )
    shifted_2PT = policy_logps_2PT[:, 1:] * completion_mask_2PT[:, 1:]
    zeros_2PT = torch.zeros_like(shifted_2PT)
    outputs = SimpleNamespace(log_probs=shifted_2PT, entropy=zeros_2PT, mean_logits=zeros_2PT, is_top1=zeros_2PT.bool())
    ref_chosen_P, ref_rejected_P = reference_2P.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask_2PT),
        "attention_mask": torch.ones_like(completion_mask_2PT),
        "completion_mask": completion_mask_2PT,
        "ref_chosen_logps": ref_chosen_P,
        "ref_rejected_logps": ref_rejected_P,
    }
    compute_loss = trl.DPOTrainer._compute_loss  # noqa: SLF001 - the public method needs a whole trainer
    return compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False), metrics


@pytest.mark.slow  # importing trl
@pytest.mark.parametrize(
    ("loss_type", "trl_type", "length_normalised"),
    [
        ("sigmoid", "sigmoid", False),
        ("hinge", "hinge", False),
        ("ipo", "ipo", False),
        ("ipo", "ipo", True),
        ("sigmoid", "sigmoid_norm", True),
    ],
)
@pytest.mark.parametrize("num_pairs", [1, 5])
def test_preference_losses_and_metrics_agree_with_trl(
    loss_type: Any, trl_type: str, length_normalised: bool, num_pairs: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    num_tokens, prompt_tokens, beta = 12, 3, 0.2
    logps_2PT = -3 * torch.rand(2 * num_pairs, num_tokens, generator=generator)
    ends_2P = torch.randint(prompt_tokens + 1, num_tokens + 1, (2 * num_pairs,), generator=generator)
    positions_T = torch.arange(num_tokens)
    mask_2PT = ((positions_T >= prompt_tokens) & (positions_T < ends_2P[:, None])).long()
    reference_2P = (logps_2PT * mask_2PT).sum(1) + 6 * torch.randn(2 * num_pairs, generator=generator)
    expected, metrics = trl_preference(logps_2PT, reference_2P, mask_2PT, trl_type, beta)

    config = LossConfig(preference=1.0, preference_type=loss_type, beta=beta, length_normalised=length_normalised)
    terms = compute_terms(*scored_pairs(logps_2PT, mask_2PT, reference_2P), config, vocab_size=9)
    found = {name: term.total.item() / num_pairs for name, term in terms.items()}
    assert found.pop("preference") == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)
    assert found.pop("padding_fraction") == 0
    logged = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    assert found == pytest.approx({name: metrics[name][0] for name in (*logged, "logps/chosen", "logps/rejected")})


def scored_pairs(logps_BT: Tensor, mask_BT: Tensor, reference_B: Tensor) -> tuple[RowLogits, Batch]:
    """Returns the inputs of the objective for a student with these log-probs; tokens with a mask of 1 are scored."""
    rows_R = mask_BT.flatten().nonzero().flatten()
    own_R = logps_BT.flatten()[rows_R]
    batch = Batch(
        sample_ids=(),
        num_pairs=len(logps_BT) // 2,
        num_sequences=len(logps_BT),
        input_ids=torch.zeros_like(mask_BT),
        attention_mask=torch.ones_like(mask_BT),
        token_mask=torch.ones_like(mask_BT).bool(),
        image_mask=torch.zeros_like(mask_BT).bool(),
        rows=rows_R,
        targets=torch.zeros_like(rows_R),
        row_sequence=rows_R // logps_BT.shape[1],
        reference_logprobs=reference_B.double(),
    )
    return RowLogits(own_R.new_zeros(len(own_R), 0), own_R, torch.zeros_like(own_R)), batch


def test_metrics_are_detached_and_the_loss_is_not() -> None:
    logps_BT = (-torch.rand(6, 4)).requires_grad_()
    logits, batch = scored_pairs(logps_BT, torch.ones(6, 4).long(), torch.zeros(6))
    terms = compute_terms(logits, batch, LossConfig(preference=1.0), vocab_size=9)
    assert [name for name, term in terms.items() if term.total.requires_grad] == ["preference"]
    assert [name for name, term in terms.items() if term.weight] == ["preference"]
