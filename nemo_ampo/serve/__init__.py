"""Serving a Hugging Face folder as an OpenAI-compatible chat API on this machine.

:mod:`.launch` starts a server process (``vllm serve``, ``trtllm-serve`` or the embedded one) and waits until it
answers; :mod:`.engine` and :mod:`.app` are the embedded one. Importing this package loads no framework.
"""
