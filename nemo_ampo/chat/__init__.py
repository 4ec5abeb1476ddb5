"""Talking to models behind OpenAI-compatible APIs: what judge, SOTOPIA partners and data writers share.

Read :mod:`nemo_ampo.chat.client` first. Around it: :mod:`~nemo_ampo.chat.transport` (HTTP),
:mod:`~nemo_ampo.chat.pool` (several addresses), :mod:`~nemo_ampo.chat.limits` (how much at a time).
A model that gave no usable answer raises :class:`ChatError`, never a made-up one.
"""

from nemo_ampo.chat.client import Asked, ChatClient, Message
from nemo_ampo.chat.completion import Completion
from nemo_ampo.chat.config import EndpointConfig, PoolMember, Price
from nemo_ampo.chat.stats import ChatStats
from nemo_ampo.errors import BudgetError, ChatError

__all__ = [
    "Asked",
    "BudgetError",
    "ChatClient",
    "ChatError",
    "ChatStats",
    "Completion",
    "EndpointConfig",
    "Message",
    "PoolMember",
    "Price",
]
