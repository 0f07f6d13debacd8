"""Checks of the dtype in which a loss accumulates."""

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def assert_accumulated(loss: Tensor, expected: object, input_dtype: torch.dtype) -> None:
    """Exact input gives float64, every other dtype float32, both right to their own last digits."""
    exact = input_dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    rtol, atol = (1e-13, 1e-14) if exact else (2e-6, 1e-6)
    np.testing.assert_allclose(loss.detach(), expected, rtol=rtol, atol=atol)
