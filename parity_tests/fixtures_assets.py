"""The real model and corpus, fetched once into the cache that users have too."""

from pathlib import Path

import pytest

from lora_jax.models import assets


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    return assets.fetch(assets.MINILM)


@pytest.fixture(scope="session")
def sms_path() -> Path:
    return assets.fetch(assets.SMS_SPAM) / assets.SMS_SPAM.files[0].name
