"""A stage's passes on real ranks with real tensors, or as one rank of a rehearsal: what they keep and ask of others.

python rehearsed.py real|rehearsed OUT.json STAGE CONFIG RANKS TOKENS [KEY=VALUE]...
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def rss(field: str) -> int:
    """Bytes: VmRSS now, VmHWM at most since it was reset."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def torch_s_own_count() -> Any:
    """``MemTracker``, without its figures by module, which it cannot keep of modules that are called again and again."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    for hook in ("_pre_fw_hook", "_post_fw_hook", "_pre_bw_hook", "_post_bw_hook"):
        setattr(tracker, hook, lambda *_: None)
    return tracker


def main(how: str, out: Path, stage: str, name: str, ranks: int, tokens: int, overrides: list[str]) -> None:
    from converters.model_config import nemo_config
    from nemo_ampo.job.plan import compose_for_plan
    from nemo_ampo.rehearse import rank as rehearsal
    from nemo_ampo.rehearse.sizes import MODELS

    cfg = compose_for_plan(stage, name, overrides, ranks)
    pipeline = int(cfg.model.pipeline_model_parallel_size)
    rows = (cfg.model.tokens_per_micro_batch or 0) // tokens or int(cfg.model.micro_batch_size)
    plan = rehearsal.Rehearsal(
        *(stage, cfg, nemo_config(MODELS[name], Path(os.devnull)), 1, ranks),
        *(tokens, rows, max(2, pipeline), (0.5, 1.0)),
    )
    rank = int(os.environ.get("RANK", "0"))
    if how == "rehearsed":
        rehearsal.prepare(on_gpu=False)
        report = rehearsal.rehearse_rank(plan, rank)
        peak, grown = report.largest()[1], 0
    else:
        from nemo_ampo import compat

        rehearsal.recorder.install()
        compat.setup("cpu")
        from nemo_ampo.rehearse import stage as passes  # imported before memory is measured

        assert passes
        with tempfile.TemporaryDirectory() as folder:
            before = rss("VmRSS")
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            with torch_s_own_count() as tracked:
                report = rehearsal.carried_out(plan, rank, "cpu", Path(folder), 0.0)
            grown = rss("VmHWM") - before
        (peak,) = (kinds["Total"] for device, kinds in tracked.get_tracker_snapshot("peak").items() if device.type == "cpu")
    result: dict[str, Any] = {
        "rss": grown,
        "peak": peak,
        "peaks": {
            f"{share} {pass_}": sum(p.values()) for share, ps in report.passes.items() for pass_, p in ps.peaks.items()
        },
        "calls": [str(call) for call in report.calls()],
    }
    out.with_suffix(f".{rank}.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7:])
