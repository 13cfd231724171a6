"""`ray job submit` of the chain to a cluster of a head and one more node, with Ray's token authentication on."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def cluster(tmp_path):
    """(environment, dashboard address) of two nodes on loopback that ask every caller for the token."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_TMPDIR": "/tmp/ray"}
    port, dashboard = free_port(), free_port()

    def ray(*arguments):
        done = subprocess.run([RAY, *arguments], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    common = ("--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats")
    ray("start", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1", *common)
    ray("start", f"--address=127.0.0.1:{port}", "--node-ip-address=127.0.0.1", *common)
    yield environment, f"http://127.0.0.1:{dashboard}"
    subprocess.run([RAY, "stop", "--force"], env=environment, capture_output=True, timeout=120)


def test_the_chain_runs_as_a_job_on_two_nodes(cluster, tmp_path):
    environment, address = cluster
    storage = tmp_path / "storage"
    job = [sys.executable, "jobs/run_recipe.py", "--recipe", "tests/e2e/smoke.toml", "--storage", str(storage)]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT / "jobs"), "--"]
    refused = subprocess.run(
        [*submit, "true"], env={**environment, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0, "a caller without the token got in"
    entry = ["bash", "-c", f"cd {ROOT} && exec {' '.join(job)}"]
    done = subprocess.run([*submit, *entry], env=environment, capture_output=True, text=True, timeout=840)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    report = json.loads((storage / "runs/smoke/report/report.json").read_text())
    assert [stage["name"] for stage in report["stages"]][0] == "prepare_data"
    assert len(report["iterations"]) == 2
    assert set(report["wer"]) == {"greedy", "lm"}
