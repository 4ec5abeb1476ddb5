"""A command without one substitute of :mod:`nemo_ampo.compat`: ``python undo.py UPSTREAM MODULE WORD ...``."""

from __future__ import annotations

import runpy
import sys

import torch  # noqa: F401 - the machine shows its GPUs when torch is imported, and reads our table for that

from nemo_ampo.compat import common, cpu


def main() -> None:
    upstream, module, *words = sys.argv[1:]
    tables = [table for table in (*common.TABLES, *cpu.TABLES) if any(row.upstream == upstream for row in table.rows)]
    for table in tables:
        table.rows[:] = [row for row in table.rows if row.upstream != upstream]
    assert upstream == "nothing" or len(tables) == 1
    sys.argv = [module, *words]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
