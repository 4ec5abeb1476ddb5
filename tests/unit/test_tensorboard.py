"""TensorBoard of this environment starts and answers: it needs parts that newer setuptools no longer have."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest


@pytest.mark.slow
def test_tensorboard_serves_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            lines = []
            for line in server.stderr:
                lines.append(line)
                if address := re.search(r"http://127\.0\.0\.1:\d+/", line):
                    break
            else:
                pytest.fail("".join(lines))
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            assert opener.open(address.group(), timeout=60).status == 200
        finally:
            server.kill()  # a SIGTERM at an unlucky moment is lost: its handler's SystemExit ends nothing but a callback
