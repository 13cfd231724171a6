"""`ray job submit` of the chain to a cluster of a head and one more node, with Ray's token authentication on."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
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

    common = ("--num-cpus=2", "--object-store-memory=300000000", "--disable-usage-stats", "--node-ip-address=127.0.0.1")
    head = (f"--port={port}", f"--dashboard-port={dashboard}")
    nodes = []
    try:
        # Kept in the foreground, so that each node can be ended by itself: `ray stop` ends every Ray of the machine.
        # Each job agent on a port of its own: the one that all would take may belong to the Ray of another test.
        for role in (("--head", *head), (f"--address=127.0.0.1:{port}",)):
            agent = f"--dashboard-agent-listen-port={free_port()}"
            nodes.append(subprocess.Popen([RAY, "start", "--block", *role, agent, *common], env=environment))
            wait_for(environment, port, len(nodes))
        yield environment, f"http://127.0.0.1:{dashboard}"
    finally:
        for node in reversed(nodes):
            node.terminate()
            node.wait(timeout=60)


def wait_for(environment: dict[str, str], port: int, nodes: int) -> None:
    """Returns when so many nodes are up."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        status = subprocess.run(
            [RAY, "status", f"--address=127.0.0.1:{port}"], env=environment, capture_output=True, text=True, timeout=60
        )
        if status.stdout.count("node_") >= nodes:
            return
        time.sleep(1)
    raise AssertionError(f"{nodes} nodes never came up: {status.stdout}{status.stderr}")


def test_the_chain_runs_as_a_job_on_two_nodes(cluster, tmp_path):
    environment, address = cluster
    storage = tmp_path / "storage"
    # Without --working-dir: two nodes of one machine share the folder into which Ray unpacks it, and disturb each other there.
    recipe = ROOT / "tests/e2e/smoke.toml"
    job = [sys.executable, str(ROOT / "jobs/run_recipe.py"), "--recipe", str(recipe), "--storage", str(storage)]
    submit = [RAY, "job", "submit", "--address", address, "--"]
    refused = subprocess.run(
        [*submit, "true"], env={**environment, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True, timeout=120
    )
    assert refused.returncode != 0, "a caller without the token got in"
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run([*submit, *job], env=environment, capture_output=True, text=True, timeout=840)
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            break  # until a node's job agent is up, the head answers so
        time.sleep(2)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    check_report(json.loads((storage / "runs/smoke/report/report.json").read_text()))
    assert (storage / "runs/smoke/report/report.html").read_text().startswith("<!doctype html>")


def check_report(report: dict) -> None:
    """What readers of report.json may count on."""
    names = [stage["name"] for stage in report["stages"]]
    assert names[0] == "prepare_data"
    assert names[-1] == "decode"
    assert all(stage["seconds"] > 0 for stage in report["stages"])
    assert [(i["teacher"], i["clusters"]) for i in report["iterations"]] == [("mfcc", 20), ("iter1 layer 3", 20)]
    for iteration in report["iterations"]:
        quality, trained = iteration["quality"], iteration["pretrain"]
        assert 0 < quality["pnmi"] < 1
        assert 0 < quality["phone_purity"] < 1
        assert 0 < quality["cluster_purity"] < 1
        assert trained["unigram_entropy_bits"] < 4.33  # log2 of 20 clusters
        assert trained["loss_bits_first"] > 4.2  # random weights know nothing
        assert 0 <= trained["masked_accuracy"] < 1
        assert 0 < trained["majority_share"] < 1
        assert trained["loss_bits_last"] < trained["loss_bits_first"] + 0.1
        assert [row["layer"] for row in iteration["layers"]] == [0, 1, 2, 3, 4]
    assert len(report["finetune"]["trials"]) == 4
    assert set(report["finetune"]["best"]) == {"pretrained", "scratch"}
    for rates in (report["wer"], report["cer"]):
        assert {mode: set(by) for mode, by in rates.items()} == {m: {"pretrained", "scratch"} for m in ("greedy", "lm")}
    assert report["examples"]
