"""``python -m lora_jax.cli``: the same as ``lora-jax``."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
