"""Talking to models behind OpenAI-compatible APIs: what judge, SOTOPIA partners and data writers share.

Read :mod:`nemo_ampo.chat.client` first. Around it: :mod:`~nemo_ampo.chat.transport` (HTTP),
:mod:`~nemo_ampo.chat.pool` (several addresses), :mod:`~nemo_ampo.chat.limits` (how much at a time).
A model that gave no usable answer raises :class:`ChatError`, never a made-up one.
"""
