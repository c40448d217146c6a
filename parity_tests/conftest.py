"""Settings for every test: strict dtype promotion, one compilation cache, assets, tiers."""

import os

import jax
import pytest

from parity_tests import tiers

jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest_plugins = ["parity_tests.fixtures_assets"]

# Most of the tests' time is the compiler's: what was compiled once, in whatever worker, child or
# stage, is read from here. `.ci/run` names a folder of its own.
CACHE = "JAX_COMPILATION_CACHE_DIR"
EVERYTHING = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}


def pytest_configure(config):
    if CACHE not in os.environ:
        os.environ[CACHE] = str(config.cache.mkdir("compiled"))
    jax.config.update(CACHE.lower(), os.environ[CACHE])
    for name, value in EVERYTHING.items():
        os.environ[name] = str(value)  # for the tests' own children
        jax.config.update(name.lower(), value)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    tiers.thin(items)
