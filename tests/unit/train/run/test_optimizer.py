"""The optimiser's parameter groups, and their repair after a universal checkpoint."""

import torch
from torch import nn

from train.run.optimizer import repair_universal_state, weight_decay_groups


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    matrices, vectors = weight_decay_groups(model.parameters(), 0.1)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 2)]
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)]


def test_a_matrix_that_zero_3_flattened_is_a_matrix() -> None:
    parameter = nn.Parameter(torch.zeros(0))
    parameter.ds_shape = torch.Size([4, 4])
    matrices, vectors = weight_decay_groups([parameter], 0.1)
    assert len(matrices["params"]) == 1
    assert not vectors["params"]


def test_the_universal_state_gets_its_weight_decays_and_separate_step_counters_back() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": 0.1} for p in parameters], lr=1e-3)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    shared = torch.tensor(5.0)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = shared
    repair_universal_state(optimizer, [0.1, 0.0])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in parameters] == [6.0, 6.0]
