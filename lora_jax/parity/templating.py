"""Pages from templates: one look, no network, every text escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

from ..errors import LoraError, ParityError

HOME = "lora_jax.parity"
INSTALL = 'pip install "lora_jax[report]"'


def template(name: str, package: str = HOME, error: type[LoraError] = ParityError) -> Any:
    """Return the template of this name from the folder ``templates`` of a package.

    What it includes, such as ``base.css``, comes from the same folder or from this package's.

    Args:
        name: of the file.
        package: whose ``templates`` hold it.
        error: what to raise.

    Raises:
        LoraError: jinja2 is not installed; says the command that installs it.
    """
    try:
        import jinja2
    except ImportError as missing:
        raise error(f"the page needs jinja2: {INSTALL}") from missing

    def source(wanted: str) -> str | None:
        for owner in (package, HOME):
            file = resources.files(owner).joinpath("templates", wanted)
            if file.is_file():
                return file.read_text("utf-8")
        return None

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)
