"""The energy of a layer's outputs from half of a Gram matrix."""

from __future__ import annotations

import pytest
import torch

from tersor.statistics.outputs import output_energy


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 255), (5, 256), (7, 257), (2, 600)])
def test_half_of_a_symmetric_matrix_is_enough(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    inputs = torch.randn(2 * columns, columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    matrix = inputs.T @ inputs / len(inputs)
    outputs = inputs.double() @ weight.double().T
    assert output_energy(weight, matrix) == pytest.approx(float(outputs.square().sum(1).mean()), rel=1e-4)
    assert output_energy(torch.zeros(rows, columns), matrix) == 0.0
