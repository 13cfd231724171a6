"""Where does each file of a corpus or a run live? Every path, as a function, relative to the storage root."""

from __future__ import annotations

SEAL = "_SUCCESS"  # written last; without it a folder is never read
CLAIM = "_STARTED"  # written first; tells whose half-done work a folder holds

MANIFEST = "manifest.parquet"  # a folder of Parquet files, one for each shard: a dataset to every reader of Parquet
INDEX_FOLDER = "index"
INDEX = f"{INDEX_FOLDER}/shards.json"
QUARANTINE = "quarantine.parquet"
REPEATS = "repeats.parquet"  # what left a shard because another has it
LOCATIONS = "locations.json"  # of tars that are shards where they lie
CENTROIDS = "centroids.npy"
HISTORY = "history.json"
QUALITY = "quality.json"
MODEL = "model.safetensors"
MODEL_CONFIG = "model.json"
METRICS = "metrics.jsonl"
REPORTS = "reports.json"


def corpus(name: str) -> str:
    return f"corpora/{name}"


def run(name: str) -> str:
    return f"runs/{name}"


def recipe(name: str) -> str:
    return f"runs/{name}/recipe.json"


def artifact(run_name: str, stage: str) -> str:
    """Folder of a stage's artifact; `stage` is its full name, such as `iter1/pretrain` or `decode`."""
    return f"runs/{run_name}/{stage}"


def audio_shard(shard: str) -> str:
    """A tar of compressed audio, inside a corpus folder."""
    return f"audio/{shard}.tar"


def manifest_part(shard: str) -> str:
    """The utterances of one audio shard, inside a corpus folder."""
    return f"{MANIFEST}/{shard}.parquet"


def part(shard: str) -> str:
    """The rows that belong to one audio shard, inside the folder of any per-shard table."""
    return f"parts/{shard}.parquet"


def feature_part(shard: str) -> str:
    """The features of one audio shard, inside the folder of extracted features."""
    return f"parts/{shard}.arrow"


def checkpoint(step: int) -> str:
    """A training checkpoint, inside the folder of a training artifact."""
    return f"checkpoints/step-{step:08d}"
