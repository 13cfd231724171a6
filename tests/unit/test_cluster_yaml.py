"""Would `ray up cluster.yaml` accept the file, and does it say what the README promises? Offline: no cloud is asked."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

util = pytest.importorskip("ray.autoscaler._private.util")
jsonschema = pytest.importorskip("jsonschema")

FILE = Path(__file__).parents[2] / "cluster.yaml"


def load() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` completes it."""
    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)
    return prepared


def test_ray_accepts_it():
    prepared = checked(load())
    assert prepared["provider"]["type"] == "aws"
    assert set(prepared["available_node_types"]) == set(load()["available_node_types"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("idle_timeout_minuts",), 10),
        (("available_node_types", "gpu", "max_worker"), 4),
        (("auth", "sshuser"), "ubuntu"),
        (("max_workers",), "forty"),
        (("worker_start_ray_commands",), "one string"),
    ],
)
def test_a_misspelt_key_or_a_wrong_type_is_refused(path, value):
    config = load()
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        checked(config)


def test_a_head_that_is_no_node_type_is_refused():
    with pytest.raises(ValueError, match="head_node_type"):
        checked(load() | {"head_node_type": "haed"})


def test_no_work_lands_on_the_head():
    config = checked(load())
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert head["resources"].get("GPU", 0) == 0
    assert head["max_workers"] == 0
    assert "InstanceMarketOptions" not in head["node_config"]  # a spot head would take the whole cluster with it


def test_workers_start_from_none_and_cpu_and_gpu_types_are_spot():
    config = checked(load())
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}
    assert {kind["min_workers"] for kind in workers.values()} == {0}
    assert all(0 < kind["max_workers"] <= config["max_workers"] for kind in workers.values())
    spot = [kind for kind in workers.values() if kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}]
    assert any(kind["resources"].get("GPU", 0) > 0 for kind in spot)
    assert any(kind["resources"]["CPU"] > 0 and "GPU" not in kind["resources"] for kind in spot)


def test_every_node_gets_the_code_and_starts_ray_in_its_place():
    config = checked(load())
    assert "." in config["file_mounts"].values()
    (head,) = (line for line in config["head_start_ray_commands"] if "ray start" in line)
    (worker,) = (line for line in config["worker_start_ray_commands"] if "ray start" in line)
    assert "--head" in head
    assert "--autoscaling-config" in head  # without it the head starts no worker
    assert "--address=$RAY_HEAD_IP" in worker


def test_no_secret_is_written_in_it():
    text = FILE.read_text(encoding="utf-8")
    assert not any(word in text for word in ("AKIA", "aws_secret", "RAY_AUTH_TOKEN="))
