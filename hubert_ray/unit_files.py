"""How do recordings become a file of units? One after the other, decoded in pieces, written as soon as each is done.

Memory holds some minutes of one recording, however long it is, and the units of a few. A recording that cannot be used costs a
line on stderr. Columns, as JSON lines or Parquet: `id`, `units`, `frame_rate_hz`, and without duplicates `durations` in frames. Of
a codebook with several label streams each entry of `units` is a list, one unit a stream.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hubert_ray.data import audio
from hubert_ray.data.corpora.source import SUFFIXES
from hubert_ray.errors import AudioError, CorpusError, StorageError
from hubert_ray.storage.filesystem import Storage
from hubert_ray.unit_bundle import UnitBundle
from hubert_ray.units.windows import deduplicate

STANDARD_INPUT = STANDARD_OUTPUT = "-"
_FRAMES_A_ROW_GROUP = 2**20
_COLUMNS = {"id": pa.string(), "units": pa.null(), "frame_rate_hz": pa.int16()}  # units: what the bundle gives
_DURATIONS = {"durations": pa.list_(pa.int32())}


def write_units(bundle: UnitBundle, audio_paths: list[str], output: str, remove_duplicates: bool) -> tuple[int, int]:
    """Units of all recordings into `output`: a file or URL named .jsonl or .parquet, or "-" for JSON lines on stdout.

    Returns how many recordings were written and how many could not be used. Raises StorageError for another kind of output,
    CorpusError where a path holds no recordings at all.
    """
    written = failed = 0
    columns = _COLUMNS | {
        "units": pa.list_(pa.uint16() if bundle.streams == 1 else pa.list_(pa.uint16(), bundle.streams))
    }
    with _opened(output, columns | (_DURATIONS if remove_duplicates else {})) as table:
        for name, path in recordings(audio_paths):
            try:
                units = _units(bundle, path)
            except (AudioError, OSError) as error:
                failed += 1
                print(f"hubert-ray: {path}: {error.strerror if isinstance(error, OSError) else error}", file=sys.stderr)
                continue
            row = {"id": name, "units": units, "frame_rate_hz": bundle.label_rate_hz}
            if remove_duplicates:
                row["units"], row["durations"] = deduplicate(units)
            table.write(row)
            written += 1
    return written, failed


def recordings(paths: list[str]) -> Iterator[tuple[str, str]]:
    """(id, path) of each recording, in the order of the paths and of names. An id is a path without suffix below the folder
    that was given, as in corpora of kind "folder"; a file that was given goes by its name. "-" is standard input.

    Raises CorpusError for a folder without recordings.
    """
    for path in paths:
        if not os.path.isdir(path):
            yield (path if path == STANDARD_INPUT else Path(path).stem), path
            continue
        found = 0
        for folder, below, names in os.walk(path):
            below.sort()
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    found += 1
                    file = os.path.join(folder, name)
                    known = os.fsencode(Path(file).relative_to(path).with_suffix("").as_posix())
                    yield known.decode(errors="replace"), file  # the output is UTF-8, which a file's name need not be
        if not found:
            raise CorpusError(f"'{path}' holds no {', '.join(SUFFIXES)} files")


def _units(bundle: UnitBundle, path: str) -> np.ndarray:
    """units_F, or units_FS, of one recording of any length."""
    stream = bundle.stream()
    with _source(path) as file:
        known = [stream.push(wave_S) for wave_S in audio.pieces(file)]
    return np.concatenate([*known, stream.close()])


@contextmanager
def _source(path: str) -> Iterator[BinaryIO]:
    """A recording's bytes; those of standard input by way of the disk, because decoders jump to and fro."""
    if path != STANDARD_INPUT:
        with open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        yield copy


class _JsonLines:
    """Every line is out as soon as it is known."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, row: dict) -> None:
        self._file.write(msgspec.json.encode(row, enc_hook=np.ndarray.tolist) + b"\n")
        self._file.flush()

    def close(self) -> None:
        pass


class _Parquet:
    """Rows are kept until there are enough of them for a row group."""

    def __init__(self, file: BinaryIO, schema: pa.Schema):
        self._writer = pq.ParquetWriter(file, schema, compression="zstd")
        self._rows: list[dict] = []
        self._frames = 0

    def write(self, row: dict) -> None:
        self._rows.append(row)
        self._frames += len(row["units"])
        row["units"] = (
            row["units"].tolist() if row["units"].ndim == 2 else row["units"]
        )  # Arrow takes no tables of numpy's
        if self._frames >= _FRAMES_A_ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._writer.schema))
        self._rows, self._frames = [], 0


@contextmanager
def _opened(output: str, columns: dict[str, pa.DataType]) -> Iterator[_JsonLines | _Parquet]:
    """What rows are written to. A file appears under its name when all of them are in it."""
    if output == STANDARD_OUTPUT:
        yield _JsonLines(sys.stdout.buffer)
        return
    folder, name = os.path.split(output)
    if not name.endswith((".jsonl", ".parquet")):
        raise StorageError(f"--output {output}: expected a file named .jsonl or .parquet, or - for lines on stdout")
    with Storage(folder or ".").create(name) as file:
        table = _Parquet(file, pa.schema(columns)) if name.endswith(".parquet") else _JsonLines(file)
        yield table
        table.close()
