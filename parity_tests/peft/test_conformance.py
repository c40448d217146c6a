"""Every configuration of PEFT's that is supported, on every family, in both directions."""

from __future__ import annotations

import warnings

import pytest

from parity_tests.peft import conformance, init_cells
from parity_tests.tiers import cases

QUICK = (
    "modules_to_save-vit",
    "trainable_token_indices-gpt2",
)


@pytest.mark.parametrize("cell", cases(conformance.CELLS, quick=QUICK, name="-".join))
def test_cell(cell, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, about defaults that the cells choose
        conformance.check_cell(*cell, tmp_path)


def test_the_page_has_every_cell():
    page = conformance.PAGE.read_text()
    cells = [*conformance.CELLS, *init_cells.CELLS]
    assert page == conformance.page({cell: conformance.passed(*cell) for cell in cells})
