"""Every call that Megatron-core and NeMo make into Transformer Engine and Apex binds to the stand-ins' signature table.

Read from the installed sources, nothing is imported: an upgrade of a framework that passes another argument fails here.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from nemo_process import HERE

sys.path.insert(0, str(HERE / "gpu_like"))
from gpu_stand_in.signatures import SIGNATURES

PACKAGES = Path(next(p for p in sys.path if p.endswith("site-packages")))
EXTENSION = "megatron/core/extensions/transformer_engine.py"
PARENTS = {
    "TELinear": "transformer_engine.pytorch.Linear",
    "TELayerNormColumnParallelLinear": "transformer_engine.pytorch.LayerNormLinear",
    "TEDotProductAttention": "transformer_engine.pytorch.DotProductAttention",
}
"""Classes of Megatron-core that call their parent's ``__init__`` and ``forward``."""
CALLS = {
    "te.pytorch.LayerNorm": "transformer_engine.pytorch.LayerNorm",
    "te.pytorch.RMSNorm": "transformer_engine.pytorch.RMSNorm",
}


def keywords(call: ast.Call) -> list[str]:
    return [keyword.arg for keyword in call.keywords if keyword.arg is not None]


def tree(file: str) -> ast.Module:
    return ast.parse((PACKAGES / file).read_text(encoding="utf-8"))


def parents_calls() -> list[tuple[str, ast.Call]]:
    found = []
    for owner in (node for node in ast.walk(tree(EXTENSION)) if isinstance(node, ast.ClassDef) and node.name in PARENTS):
        for call in (node for node in ast.walk(owner) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name in ("super().__init__", "super().forward"):
                row = PARENTS[owner.name] + (".forward" if name.endswith("forward") else "")
                found.append((row, call))
    return found


def named_calls() -> list[tuple[str, ast.Call]]:
    calls = [node for node in ast.walk(tree(EXTENSION)) if isinstance(node, ast.Call)]
    return [(CALLS[name], call) for call in calls if (name := ast.unparse(call.func)) in CALLS]


@pytest.mark.parametrize(
    ("row", "call"),
    [*parents_calls(), *named_calls()],
    ids=lambda value: value if isinstance(value, str) else f"line{value.lineno}",
)
def test_a_call_binds_to_its_row(row: str, call: ast.Call) -> None:
    given = dict.fromkeys(keywords(call), None)
    SIGNATURES[row].signature.bind_partial(*[None] * len(call.args), **given)


def test_every_kind_of_call_was_found() -> None:
    assert {row for row, _ in parents_calls()} == {f"{name}{end}" for name in PARENTS.values() for end in ("", ".forward")}
    assert {row for row, _ in named_calls()} == set(CALLS.values())


def test_keywords_collected_before_the_call_bind_too() -> None:
    linear = SIGNATURES["transformer_engine.pytorch.Linear"].signature
    linear.bind_partial(params_dtype=None, device=None, rng_tracker_name=None)
    SIGNATURES["transformer_engine.pytorch.LayerNormLinear"].signature.bind_partial(
        params_dtype=None, device=None, normalization=None
    )
    SIGNATURES["transformer_engine.pytorch.DotProductAttention"].signature.bind_partial(
        num_gqa_groups=None, attention_type=None, softmax_scale=None
    )


def test_the_optimizers_call_binds() -> None:
    (call,) = [
        node
        for node in ast.walk(tree("megatron/core/optimizer/__init__.py"))
        if isinstance(node, ast.Call) and ast.unparse(node) == "Adam(**kwargs)"
    ]
    assert call
    SIGNATURES["transformer_engine.pytorch.optimizers.FusedAdam"].signature.bind(
        params=[], lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-8
    )


def test_a_new_keyword_would_be_refused() -> None:
    with pytest.raises(TypeError):
        SIGNATURES["transformer_engine.pytorch.Linear"].signature.bind_partial(something_new=1)


def test_every_row_says_where_it_was_read() -> None:
    assert all(row.version and row.file for row in SIGNATURES.values())
