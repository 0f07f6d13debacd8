"""Axes as in train/losses.py."""

import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.reference import losses as reference
from train.losses import preference_loss

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
    loss_type: str, label_smoothing: float, shift: float
) -> None:
    pairs = [values_P.float() for values_P in random_pairs(shift)]
    expected = reference.preference(*pairs, loss_type, 0.1, label_smoothing)
    if loss_type == "kto_pair":
        expected = expected.reshape(2, -1).mean(0)  # so that the mean over pairs is the one over both halves
    result = preference_loss(*pairs, loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing)
    assert result.loss_P.dtype == torch.float32
    np.testing.assert_allclose(result.loss_P, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize(("loss_type", "label_smoothing"), PREFERENCES)
def test_preference_gradients_agree_with_finite_differences(
    loss_type: str, label_smoothing: float, shift: float
) -> None:
    """For the paired KTO form this includes the gradient through the means that estimate the KL."""
    chosen_P, rejected_P, *references = random_pairs(shift)

    def mean_loss(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
        return preference_loss(
            chosen_P, rejected_P, *references, loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing
        ).loss_P

    assert torch.autograd.gradcheck(mean_loss, (chosen_P.requires_grad_(), rejected_P.requires_grad_()))


@pytest.mark.parametrize(
    ("loss_type", "expected"), [("sigmoid", math.log(2)), ("ipo", 25.0), ("hinge", 1.0), ("kto_pair", 0.5)]
)
def test_the_policy_that_equals_the_reference_has_the_known_loss_and_no_reward(loss_type: str, expected: float) -> None:
    chosen_P, rejected_P, _, _ = random_pairs()
    result = preference_loss(chosen_P, rejected_P, chosen_P, rejected_P, loss_type=loss_type, beta=0.1)
    torch.testing.assert_close(result.loss_P, torch.full_like(chosen_P, expected))
    assert (result.chosen_reward_P == 0).all()
    assert (result.rejected_reward_P == 0).all()


def test_rewards_are_detached_and_the_loss_is_not() -> None:
    chosen_P, rejected_P, *references = (values_P.requires_grad_() for values_P in random_pairs())
    result = preference_loss(chosen_P, rejected_P, *references, loss_type="sigmoid", beta=0.3)
    torch.testing.assert_close(result.chosen_reward_P, (0.3 * (chosen_P - references[0])).detach())
    torch.testing.assert_close(result.rejected_reward_P, (0.3 * (rejected_P - references[1])).detach())
    assert not result.chosen_reward_P.requires_grad
    assert not result.rejected_reward_P.requires_grad
    assert result.loss_P.requires_grad


def test_bf16_sequence_logprobs_are_subtracted_in_float32() -> None:
    """-1000 + 0.25 is not a bf16 number: subtracting in bf16 would lose the quarter."""
    policy_P, reference_P = torch.tensor([-1000.0]).bfloat16(), torch.tensor([-0.25]).bfloat16()
    result = preference_loss(policy_P, reference_P, reference_P, reference_P, loss_type="hinge", beta=1.0)
    assert result.chosen_reward_P.tolist() == [-999.75]


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
def test_label_smoothing_without_a_meaning_is_refused(loss_type: str, label_smoothing: float) -> None:
    with pytest.raises(ValueError, match=f"label_smoothing is {label_smoothing}"):
        preference_loss(*random_pairs(), loss_type=loss_type, beta=0.1, label_smoothing=label_smoothing)


def trl_preference(
    policy_logps_2PT: Tensor, reference_2P: Tensor, completion_mask_2PT: Tensor, loss_type: str, beta: float
) -> tuple[Tensor, dict[str, list[float]]]:
    """The loss and the logged metrics of TRL's own DPOTrainer, from the log-probs that a model would give."""
    trl = pytest.importorskip("trl")
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
        _metrics={"train": defaultdict(list)},
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
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, trainer._metrics["train"]


@pytest.mark.slow  # importing trl
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("num_pairs", [1, 5])
def test_preference_losses_and_rewards_agree_with_trl(loss_type: str, num_pairs: int) -> None:
    generator = torch.Generator().manual_seed(2)
    num_tokens, prompt_tokens, beta = 12, 3, 0.2
    logps_2PT = -3 * torch.rand(2 * num_pairs, num_tokens, generator=generator)
    ends_2P = torch.randint(prompt_tokens + 1, num_tokens + 1, (2 * num_pairs,), generator=generator)
    positions_T = torch.arange(num_tokens)
    mask_2PT = ((positions_T >= prompt_tokens) & (positions_T < ends_2P[:, None])).long()
    policy_2P = (logps_2PT * mask_2PT).sum(1)
    reference_2P = policy_2P + 6 * torch.randn(2 * num_pairs, generator=generator)
    expected, metrics = trl_preference(logps_2PT, reference_2P, mask_2PT, loss_type, beta)

    lengths_2P = mask_2PT.sum(1) if loss_type == "ipo" else torch.ones(2 * num_pairs)
    pairs = (*(policy_2P / lengths_2P).chunk(2), *(reference_2P / lengths_2P).chunk(2))
    result = preference_loss(*pairs, loss_type=loss_type, beta=beta)
    assert result.loss_P.mean().item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-6)

    chosen_lengths_P, rejected_lengths_P = lengths_2P.chunk(2)
    chosen_P = result.chosen_reward_P * chosen_lengths_P
    rejected_P = result.rejected_reward_P * rejected_lengths_P
    assert metrics["rewards/chosen"] == [pytest.approx(chosen_P.mean().item(), rel=1e-6, abs=1e-6)]
    assert metrics["rewards/rejected"] == [pytest.approx(rejected_P.mean().item(), rel=1e-6, abs=1e-6)]
    assert metrics["rewards/accuracies"] == [pytest.approx((chosen_P > rejected_P).float().mean().item())]
