"""``python -m benchmarks``: check, time and report."""

from __future__ import annotations

import sys

from lora_jax.core.errors import LoraError

try:
    import rich  # noqa: F401
    import tyro
except ImportError as error:
    raise SystemExit(f'{error.name} is not installed: pip install "lora_jax[bench]"') from error

from .commands import COMMANDS


def main(arguments: list[str] | None = None) -> None:
    """Run the command; an error is one message and exit status 1."""
    options = tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in COMMANDS.items()},
        prog="python -m benchmarks",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    (act,) = (act for kind, act in COMMANDS.values() if type(options) is kind)
    try:
        status = act(options)
    except LoraError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    main()
