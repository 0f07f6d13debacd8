"""Checks of the dtype in which a loss accumulates."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def assert_accumulated(loss: Tensor, expected: Any, input_dtype: torch.dtype) -> None:
    """Asserts that a loss is float64 for float64 input and float32 for any other, and exact but for rounding."""
    is_float64 = input_dtype == torch.float64
    assert loss.dtype == (torch.float64 if is_float64 else torch.float32)
    rtol, atol = (1e-13, 1e-14) if is_float64 else (2e-6, 1e-6)
    np.testing.assert_allclose(loss.detach(), np.asarray(expected), rtol=rtol, atol=atol)
