"""The judge: a language model behind an OpenAI-compatible API that says how far both speakers have come.

Read :mod:`nemo_ampo.judge.verdict` for what counts as an answer, :mod:`nemo_ampo.judge.client` for how one is
obtained, :mod:`nemo_ampo.judge.background` for how a synchronous loop gets many of them while it generates.
A judge that gave no usable answer raises :class:`JudgeError`: its sample has no reward, never a made-up one.
"""
