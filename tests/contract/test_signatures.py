"""Every call that NeMo, Megatron-core and NeMo-Aligner make into TensorRT-LLM binds to the stand-in's signature table.

Read from the installed sources, nothing is imported: an upgrade of a framework that passes another argument, or calls
something new, fails here and not on a cluster.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

STAND_IN = Path(__file__).resolve().parents[1] / "support" / "trtllm_stand_in"
sys.path.insert(0, str(STAND_IN))
from stand_in.signatures import ELSEWHERE, SIGNATURES  # noqa: E402  (a folder of its own, see above)

PACKAGES = Path(next(p for p in sys.path if p.endswith("site-packages")))
EXPORT = "megatron/core/export/trtllm"
FILES = (
    "nemo_aligner/utils/trt_llm.py",
    "nemo/export/tensorrt_llm.py",
    "nemo/export/trt_llm/tensorrt_llm_run.py",
    "nemo/export/trt_llm/converter/utils.py",
    f"{EXPORT}/trtllm_helper.py",
    f"{EXPORT}/trt_model_config.py",
    f"{EXPORT}/engine_builder/trtllm_engine_builder.py",
    f"{EXPORT}/trtllm_weights_converter/distributed_trtllm_model_weights_converter.py",
)
NOT_CALLED = (
    "nemo/export/multimodal/build.py",
    "nemo/export/multimodal/run.py",
    "nemo/export/onnx_llm_exporter.py",
    "nemo/export/trt_llm/converter/model_converter.py",
    "nemo/export/trt_llm/converter/model_to_trt_llm_ckpt.py",
    "nemo/export/trt_llm/nemo_ckpt_loader/nemo_file.py",
    "nemo/export/trt_llm/qnemo/qnemo_to_tensorrt_llm.py",
    "nemo/export/trt_llm/tensorrt_llm_build.py",
    "nemo/export/trt_llm/utils.py",
    "nemo/export/utils/utils.py",
    f"{EXPORT}/trtllm_weights_converter/single_device_trtllm_model_weights_converter.py",
)
"""Files that import TensorRT-LLM and that a build and refit through Megatron-core's path does not run."""
OURS = ("trtllm_export.py", "trtllm_refit.py")
ROOTS = ("tensorrt_llm", "tensorrt", "mpi4py")
INSTANCES = {
    "plugin_config.enable_paged_kv_cache": "tensorrt_llm.plugin.PluginConfig.enable_paged_kv_cache",
    "refitter.get_all_weights": "tensorrt.Refitter.get_all_weights",
    "refitter.get_weights_prototype": "tensorrt.Refitter.get_weights_prototype",
    "refitter.set_named_weights": "tensorrt.Refitter.set_named_weights",
    "refitter.refit_cuda_engine": "tensorrt.Refitter.refit_cuda_engine",
    "model_cls.from_config": "tensorrt_llm.models.LLaMAForCausalLM.from_config",
    "model.load": "tensorrt_llm.models.LLaMAForCausalLM.load",
    "engine.save": "tensorrt_llm.builder.Engine.save",
    "tensorrt_llm_run.tensorrt_llm_worker_context.decoder.generate": "tensorrt_llm.runtime.ModelRunner.generate",
    "self.trt_llm_exporter.decoder.generate": "tensorrt_llm.runtime.ModelRunner.generate",
}
"""Methods called on an object: how upstream spells it, and which row it is."""


@dataclass(frozen=True)
class Call:
    """One call in a source file, with its arguments' names."""

    name: str
    where: str
    positional: int
    keywords: tuple[str, ...]


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


def calls_in(path: Path) -> list[Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    dicts: dict[str, tuple[str, ...]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ROOTS:
                    names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ROOTS:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) and isinstance(node.targets[0], ast.Name):
            keys = [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
            dicts[node.targets[0].id] = tuple(map(str, keys))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        spelled = dotted(node.func)
        first, _, rest = spelled.partition(".")
        name = INSTANCES.get(spelled) or (f"{names[first]}.{rest}".rstrip(".") if first in names else "")
        if not name:
            continue
        keywords = [k.arg for k in node.keywords if k.arg]
        for spread in (k.value for k in node.keywords if k.arg is None):
            keywords += dicts.get(dotted(spread), ())
        found.append(Call(name, f"{path.name}:{node.lineno}", len(node.args), tuple(keywords)))
    return found


def upstream_calls() -> list[Call]:
    ours = [Path(__file__).resolve().parents[2] / "nemo_ampo/rollout" / name for name in OURS]
    return [call for path in [*(PACKAGES / f for f in FILES), *ours] for call in calls_in(path)]


def problem(call: Call) -> str:
    """Why the call does not fit the table, or nothing."""
    if call.name in ELSEWHERE:
        return ""
    if call.name not in SIGNATURES:
        return f"{call.where}: {call.name} is in neither list"
    try:
        SIGNATURES[call.name].signature.bind(*[None] * call.positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.where}: {call.name}: {error}"
    return ""


def test_every_call_binds_to_the_table() -> None:
    calls = upstream_calls()
    assert len(calls) > 25
    assert [text for text in map(problem, calls) if text] == []


def test_no_file_that_imports_it_is_overlooked() -> None:
    imports = re.compile(rf"^\s*(?:import|from) (?:{'|'.join(ROOTS)})\b", re.MULTILINE)
    paths = [
        p for folder in ("nemo/export", "megatron/core/export", "nemo_aligner") for p in (PACKAGES / folder).rglob("*.py")
    ]
    found = {str(p.relative_to(PACKAGES)) for p in paths if imports.search(p.read_text(encoding="utf-8"))}
    assert found == {*FILES, *NOT_CALLED}


def test_the_table_holds_nothing_that_is_never_called() -> None:
    called = {call.name for call in upstream_calls()}
    assert set(SIGNATURES) - called <= {"tensorrt_llm._utils.pad_vocab_size"}  # only imported


@pytest.mark.parametrize(
    ("name", "positional", "keywords"),
    [
        # NeMo 2.2.1 before TensorRT-LLM 0.16: the argument the older runtime does not have, and one left out.
        ("tensorrt_llm.runtime.ModelRunner.from_engine", 1, ("rank",)),
        ("tensorrt_llm.builder.Engine.from_buffer", 1, ("buffer",)),
        ("tensorrt_llm.runtime.SamplingConfig", 0, ("end_id", "pad_id", "random_seed")),
        ("tensorrt_llm.runtime.ModelRunner.something_new", 0, ()),
    ],
)
def test_the_check_can_fail(name: str, positional: int, keywords: tuple[str, ...]) -> None:
    assert problem(Call(name, "x.py:1", positional, keywords))


def test_every_row_says_where_it_was_read() -> None:
    assert all(row.version and row.file for row in SIGNATURES.values())
