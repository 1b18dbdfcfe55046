"""The Hugging Face hub: told at once when it cannot be reached, and what to do instead."""

import ssl
import urllib.request
from http.client import HTTPException
from urllib.error import HTTPError, URLError

HUB_TIMEOUT = 5.0
"""Seconds that the hub may take to answer. Without the question, no network costs 23 s of retries a data set."""


def require_hub(wanted: str, remedy: str) -> None:
    """Raise at once when the Hugging Face hub cannot be reached, instead of after the clients' retries.

    Nothing is asked when HF_HUB_OFFLINE is set: the clients then read their cache and fail at once by themselves.

    Args:
        wanted: what is to be fetched, for the message.
        remedy: what can be given instead, for the message.

    Raises:
        ConnectionError: no answer within `HUB_TIMEOUT` seconds.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_TIMEOUT).close()
    except HTTPError:
        return  # a refusal is an answer
    except (OSError, HTTPException) as error:
        if isinstance(error, URLError) and isinstance(error.reason, ssl.SSLError):
            return  # reachable; the clients bring their own certificates
        raise ConnectionError(hub_help(wanted, f"{constants.ENDPOINT} cannot be reached ({error})", remedy)) from error


def hub_help(wanted: str, problem: str, remedy: str) -> str:
    """Return the message for something that the hub did not give: what, why, and what to do instead."""
    return (
        f"cannot load {wanted}: {problem.rstrip('.')}.\n"
        "  - in the hub's cache already: set HF_HUB_OFFLINE=1; not there: unset it and check the network or proxy\n"
        f"  - without a network: {remedy}"
    )
