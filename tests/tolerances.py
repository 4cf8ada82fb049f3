"""How far a result may be from its reference, by dtype and by the number of terms summed."""

from __future__ import annotations

import torch

# Exact equality: for ops that select, pack or move bits and round nothing.
EXACT = {"rtol": 0.0, "atol": 0.0}


def matmul_tolerance(dtype: torch.dtype, terms: int) -> dict[str, float]:
    """Tolerance of a product of ``terms`` terms of standard normal factors.

    The reference is computed in float64 and rounded to ``dtype`` once.

    - rtol: the result is rounded once as well, so the two differ by one unit in the last place at
      most, which is ``eps`` relative (2**-23 fp32, 2**-10 fp16, 2**-7 bf16).
    - atol: partial sums grow like ``sqrt(terms)`` and each of ``terms`` additions rounds by half an
      ``eps`` of the accumulator (fp32, for float64 inputs float64); errors of random sign add up
      like another ``sqrt(terms)``. Factor 4 for the spread.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "rtol": torch.finfo(dtype).eps,
        "atol": 4 * max(terms, 1) * torch.finfo(accumulator).eps / 2,
    }
