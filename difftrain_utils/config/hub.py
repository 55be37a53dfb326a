"""Whether the Hugging Face hub can be asked for what a config names."""

import os
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit
from urllib.request import getproxies

from difftrain_utils.errors import InputError, warn
from difftrain_utils.files import local_path

ENDPOINT = "https://huggingface.co"


def use_cache_without_network(names: Sequence[str]) -> None:
    """Before the hub's libraries are imported: if one of the names may be the hub's, and its host has no address here,
    let them use what is cached (HF_HUB_OFFLINE) instead of trying for a minute."""
    is_here = {name: name.startswith("builtin:") or os.path.exists(local_path(name)) for name in names}
    of_hub = [name for name in names if not is_here[name]]
    if not of_hub or os.environ.get("HF_HUB_OFFLINE") or getproxies().keys() & {"http", "https", "all"}:
        return
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    try:
        host = urlsplit(endpoint).hostname
        socket.getaddrinfo(host, None)
    except ValueError as error:
        raise InputError(f"HF_ENDPOINT: {endpoint}: {error}") from None
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        warn(f"{host} cannot be reached ({error.strerror}): of {', '.join(of_hub)} only what is cached is used")
