"""Small corpora for tests: manifest parts with the index that prepare_data would make of them."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa

from hubert_ray.data.index import Index, write_index
from hubert_ray.data.shards import Manifest
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage


def write_corpus(storage: Storage, path: str, parts: Mapping[str, pa.Table]) -> Index:
    """`parts`: shard -> manifest rows, all of one split; `<split>-00000`, or `<part of a mix>-<split>-00000`."""
    for shard, table in parts.items():
        storage.write(f"{path}/{layout.manifest_part(shard)}", schemas.encode(table))
    places = {shard: shard.split("-") for shard in parts}
    return write_index(
        storage, path, ((shard, words[-2], words[0] if len(words) > 2 else "") for shard, words in places.items())
    )


def whole_manifest(storage: Storage, path: str) -> Manifest:
    """All that the parts of a prepared corpus hold, in the order of the index."""
    return Manifest.read(storage, path, [shard.name for shard in Index.open(storage, path).shards])
