"""NeMo opens a policy's tokenizer as the rest of the program does: with :mod:`nemo_ampo.model_folder.loading`."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Replace what NeMo 2.2.1 calls to read a Hugging Face tokenizer folder."""
    from nemo.collections.common.tokenizers.huggingface import auto_tokenizer

    auto_tokenizer.AUTOTOKENIZER = _Loader


class _Loader:
    """Stands where transformers' AutoTokenizer stood; every folder is a policy's."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str, **_: Any) -> Any:
        from nemo_ampo.model_folder.loading import load_tokenizer

        return load_tokenizer(pretrained_model_name_or_path)
