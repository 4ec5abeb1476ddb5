"""A stage's output is ours: the frameworks' repeated warnings stay out of it unless ``--verbose`` is given."""

from __future__ import annotations

import logging
import os
import warnings

_NEMO_LEVEL = logging.ERROR
_LOGGERS = (
    "megatron",
    "megatron.core",
    "megatron.core.num_microbatches_calculator",
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "torch.distributed",
    "torch.distributed.elastic",
    "datasets",
    "transformers",
    "httpx",
    "httpx2",
    "httpcore",
    "openai",
    "matplotlib",
    "matplotlib.font_manager",
)


def before_imports() -> None:
    """Settings that are read while the frameworks are being imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GLOG_minloglevel", "3")
    warnings.filterwarnings("ignore", module=r"(?!nemo_ampo|converters|recipes).*")
    # Third-party SyntaxWarnings (invalid escapes) carry the file name as module and appear at first compile.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, message=r".*(Transformer Engine|Apex).*")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def after_imports() -> None:
    """NeMo installs handlers of its own at import; set their level once they exist."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(_NEMO_LEVEL)
    for name in ("nemo_logger", *_LOGGERS):
        logging.getLogger(name).setLevel(_NEMO_LEVEL)
