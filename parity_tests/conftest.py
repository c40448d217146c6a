"""Settings for every test: strict dtype promotion, and the fixtures of the real assets."""

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")

pytest_plugins = ["parity_tests.fixtures_assets"]
