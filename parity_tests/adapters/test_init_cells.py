"""Every initialisation of PEFT's on every family, in both directions."""

from __future__ import annotations

import warnings

import pytest

from parity_tests.peft import init_cells
from parity_tests.tiers import cases


@pytest.mark.slow
@pytest.mark.parametrize("cell", cases(init_cells.CELLS, name="-".join))
def test_cell(cell, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about defaults that the cells choose
        init_cells.check_cell(*cell, tmp_path)
