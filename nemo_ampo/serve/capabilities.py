"""What a server says it can do beyond the OpenAI API."""

from __future__ import annotations

import json

from nemo_ampo.chat.completion import CallError
from nemo_ampo.chat.config import api_url
from nemo_ampo.chat.transport import Transport

MODE_BIAS = "mode_bias"
CAPABILITIES = "capabilities"
"""Field of a ``/v1/models`` entry that lists them."""


async def announces_mode_bias(base_url: str, timeout_s: float = 30.0) -> bool:
    """Whether the endpoint serves the mode dial; False also for one that does not answer."""
    transport = Transport(timeout_s)
    try:
        entries = json.loads(await transport.get(api_url(base_url, "models"), ""))["data"]
        return any(MODE_BIAS in entry.get(CAPABILITIES, ()) for entry in entries)
    except (CallError, ValueError, LookupError, TypeError, AttributeError):
        return False
    finally:
        await transport.aclose()
