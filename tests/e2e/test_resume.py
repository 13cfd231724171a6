"""Kill the driver with SIGKILL in every stage, run the same command again: it goes on, to the same result.

One undisturbed run beside one that is killed once per stage, each time after the stage has left something half done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch

from hubert_ray.config.loading import load_recipe

pytestmark = pytest.mark.slow
SMOKE = Path(__file__).parent / "smoke.toml"
# stage -> what must be there when the driver is killed
KILLS = {
    "prepare_data": "corpora/smoke/quarantine/*.parquet",
    "iter1/learn_kmeans": "runs/smoke/iter1/learn_kmeans/progress.npz",
    "iter1/assign_labels": "runs/smoke/iter1/assign_labels/parts/*.parquet",
    "iter1/pretrain": "runs/smoke/iter1/pretrain/checkpoints/*/_SUCCESS",
    "iter1/measure_layers": "runs/smoke/iter1/measure_layers/cells/*.json",
    "finetune/pretrained": "runs/smoke/finetune/pretrained/trials/*/metrics.jsonl",
    "decode": "runs/smoke/decode/lm.arpa",
    "report": "runs/smoke/report/_STARTED",
}


def command(storage: Path, name: str = "run") -> list[str]:
    recipe = storage.parent / "one_iteration.json"
    if not recipe.exists():
        recipe.write_bytes(one_iteration())
    return [sys.executable, "-m", "hubert_ray.cli", name, "--recipe", str(recipe), "--storage", str(storage)]


def one_iteration() -> bytes:
    """The smoke recipe with its first iteration only, and a sweep of one rung: ASHA stops nothing, so nothing depends on the
    order in which trials report."""
    recipe = load_recipe(str(SMOKE), ["finetune.sweep.rungs=1", "finetune.scratch_sweep=null"])
    return msgspec.json.encode(msgspec.structs.replace(recipe, iterations=recipe.iterations[:1]))


def run_to_the_end(storage: Path) -> str:
    done = subprocess.run(command(storage), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def kill_in(storage: Path, pattern: str) -> bool:
    """Starts a run and kills its driver as soon as `pattern` exists; False where the run ended before that was seen."""
    process = subprocess.Popen(
        command(storage), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while not list(storage.glob(pattern)):
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, f"{pattern} never came"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return True


@pytest.fixture(scope="module")
def storages(tmp_path_factory):
    return tmp_path_factory.mktemp("undisturbed") / "s", tmp_path_factory.mktemp("killed") / "s"


@pytest.mark.timeout(1800)  # a run, and a start per stage: ten minutes where two cores are busy
def test_killed_in_every_stage_ends_the_same(storages):
    undisturbed, killed = storages
    run_to_the_end(undisturbed)
    for stage, pattern in KILLS.items():
        if stage == "report":
            continue  # over in a fraction of a second: see the test of unsealed artifacts below
        assert kill_in(killed, pattern), f"{stage}: the run ended before it could be killed"
        folder = killed / ("corpora/smoke" if stage == "prepare_data" else f"runs/smoke/{stage}")
        assert (folder / "_STARTED").exists()
        assert not (folder / "_SUCCESS").exists(), f"{stage} was finished before it was killed"
    run_to_the_end(killed)
    same_bytes(undisturbed, killed, "corpora/smoke/audio/*.tar")
    same_bytes(undisturbed, killed, "runs/smoke/iter1/learn_kmeans/centroids.npy")
    same_bytes(undisturbed, killed, "runs/smoke/iter1/assign_labels/parts/*.parquet")
    same_bytes(undisturbed, killed, "runs/smoke/iter1/measure_layers/quality.json")
    same_weights(undisturbed, killed, "runs/smoke/iter1/pretrain/model.safetensors")
    same_weights(undisturbed, killed, "runs/smoke/finetune/pretrained/model.safetensors")
    same_bytes(undisturbed, killed, "runs/smoke/decode/parts/*.parquet")
    reports = [json.loads((s / "runs/smoke/report/report.json").read_text()) for s in storages]
    assert reports[0]["wer"] == reports[1]["wer"]
    curves = [
        [(row["step"], round(row["loss_bits"], 5)) for row in r["iterations"][0]["pretrain"]["curve"]] for r in reports
    ]
    assert curves[0] == curves[1]


def same_bytes(one: Path, other: Path, pattern: str) -> None:
    files = sorted(path.relative_to(one) for path in one.glob(pattern))
    assert files, pattern
    assert files == sorted(path.relative_to(other) for path in other.glob(pattern))
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def same_weights(one: Path, other: Path, file: str) -> None:
    first, second = (safetensors.torch.load_file(s / file) for s in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-6)


def test_finished_run_is_skipped_in_seconds(storages):
    undisturbed, _ = storages
    assert undisturbed.exists(), "runs after the test above"
    begun = time.monotonic()
    output = run_to_the_end(undisturbed)
    assert time.monotonic() - begun < 8  # a Python start and a seal per stage: no torch, no Ray
    lines = [line for line in output.splitlines() if line.startswith("[")]
    assert len(lines) == len(KILLS)
    assert all(line.endswith("done before") for line in lines)
    assert output.splitlines()[-1].endswith("report.json")


def test_unsealed_report_is_made_again(storages):
    undisturbed, _ = storages
    report = undisturbed / "runs/smoke/report"
    (report / "_SUCCESS").unlink()
    (report / "report.json").unlink()
    run_to_the_end(undisturbed)
    assert json.loads((report / "report.json").read_text())["run"] == "smoke"


def test_a_changed_recipe_under_the_same_name_is_an_error(storages):
    undisturbed, _ = storages
    changed = subprocess.run(
        [*command(undisturbed), "--set", "iterations.iter1.pretrain.steps=13"], capture_output=True, text=True
    )
    assert changed.returncode == 1
    assert "settings.steps: 12 on storage, 13 in the recipe" in changed.stderr
    assert "hubert-ray remove runs/smoke/iter1/pretrain" in changed.stderr
    assert "Traceback" not in changed.stderr


def doctor(storage: Path, *arguments: str) -> tuple[int, dict[str, dict]]:
    done = subprocess.run(
        [*command(storage, "doctor"), "--json", *arguments], capture_output=True, text=True, timeout=120
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"] == (done.returncode == 0)
    return done.returncode, {finding["check"]: finding for finding in told["findings"]}


def test_the_doctor_tells_a_healthy_run_from_a_broken_one(storages):
    healthy, broken = storages
    code, findings = doctor(healthy)
    assert code == 0
    assert {finding["status"] for finding in findings.values()} == {"ok"}
    assert {
        "nodes.storage",
        "nodes.versions",
        "run.artifacts",
        "corpus.shards",
        "iter1.labels.lengths",
    } <= findings.keys()
    shard = next((broken / "corpora/smoke/audio").glob("train-*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    next((broken / "runs/smoke/iter1/assign_labels/parts").glob("train-*.parquet")).unlink()
    code, findings = doctor(broken, "--no-nodes")
    assert code == 1
    assert {name for name, finding in findings.items() if finding["status"] == "failed"} == {
        "corpus.shards",
        "iter1.labels.lengths",
    }
    (broken / "runs/smoke/iter1/learn_kmeans/centroids.npy").write_bytes(b"")
    os.truncate(broken / "runs/smoke/iter1/pretrain/model.safetensors", 1000)
    code, findings = doctor(broken, "--no-nodes")
    assert code == 1
    assert {"iter1/learn_kmeans.files", "iter1/pretrain.weights", "corpus.shards"} <= {
        name for name, finding in findings.items() if finding["status"] == "failed"
    }
    code, findings = doctor(broken.parent / "nowhere", "--no-nodes")
    assert (code, findings["run.storage"]["status"]) == (1, "failed")
    assert not (broken.parent / "nowhere").exists()
    code, findings = doctor(healthy, "--no-nodes", "--set", "name=another", "--set", "corpus.name=another")
    assert (code, findings["run.finished"]["status"]) == (0, "warning")
    code, findings = doctor(healthy, "--no-nodes", "--set", "iterations.iter1.kmeans.seed=5")
    assert code == 1
    assert "kmeans.seed: 0 on storage, 5 in the recipe" in findings["run.artifacts"]["found"]
