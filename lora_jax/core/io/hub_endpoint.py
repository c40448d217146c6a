"""The hub's address, whether it may be asked, and whether it answers."""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request

from ..errors import AssetError
from .network import Limits, within

_PROBE_SECONDS = 5.0


OFFLINE = ("LORA_JAX_OFFLINE", "HF_HUB_OFFLINE")


def endpoint() -> str:
    """Return where the hub is: ``HF_ENDPOINT`` or Hugging Face's own."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def is_set(variable: str) -> bool:
    """Tell whether an environment variable says yes."""
    return os.environ.get(variable, "").lower() not in ("", "0", "no", "off", "false")


def _unset_offline() -> str:
    return "".join(f" and unset {name}" for name in OFFLINE if is_set(name))


def _refuse_offline(*variables: str) -> None:
    for variable in filter(is_set, variables):
        raise AssetError(f"{variable} is set")


def probe(url: str) -> None:
    """Raise at once where ``huggingface_hub`` would retry for 23 s; any HTTP answer will do.

    Raises:
        AssetError: why nobody answers.
    """
    try:
        request = urllib.request.Request(url, method="HEAD")
        # The timeout is of each byte; the limit, of all of them.
        within(
            lambda: urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close(),
            url,
            limits=Limits(stalled=2 * _PROBE_SECONDS),
        )
    except urllib.error.HTTPError as answer:
        answer.close()
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise AssetError(f"cannot be reached: {reason}") from error


def one_line(text: str, limit: int = 400) -> str:
    """Return a text without line breaks, cut to the limit."""
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
