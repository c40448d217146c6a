"""Pages from templates: one look, no network, every text escaped, control characters too."""

from __future__ import annotations

from importlib import resources
from typing import Any

from ...core.errors import LoraError, ParityError
from ...core.shown_text import escaped_lines

HOME = "lora_jax.parity.reports"
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
        finalize=_shown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = _shown
    return environment.get_template(name)


def _shown(value: Any) -> Any:
    """Return a text without control characters; what is markup already stays."""
    plain = isinstance(value, str) and not hasattr(value, "__html__")
    return escaped_lines(value) if plain else value
