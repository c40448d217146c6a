"""Settings for every test: strict dtype promotion, the real assets, and the tiers of tables."""

import jax
import pytest

from parity_tests import tiers

jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest_plugins = ["parity_tests.fixtures_assets"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    tiers.thin(items)
