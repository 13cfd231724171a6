"""Which recordings does a table name or hold? CSV, TSV and JSONL tables of paths; Parquet with the audio in a column.

Neither is ever in memory as a whole: a table of paths is streamed once to find where its groups of rows begin, and then a
group at a time; of Parquet the footers are read, and then a page at a time (pyarrow writes 1024 rows to a page, or a row group
where that is smaller).
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from hubert_ray.config.recipe import AudioTable, Parquet
from hubert_ray.data.corpora.source import SUFFIXES, Group, Placed, one_line, split_of
from hubert_ray.data.shards import RawUtterance, Rejected, is_text
from hubert_ray.errors import AudioError, CorpusError

BUFFER = 2**20  # bytes of one read
MAX_LINE = 2**20  # bytes; a longer line is broken up, and its pieces are bad rows
MAGIC = {b"fLaC": "flac", b"RIFF": "wav", b"OggS": "ogg"}  # how a recording begins -> its suffix


class AudioTableSource(Placed):
    """A .csv, .tsv or .jsonl file with a row per recording. A group is some rows, named by the bytes that hold them."""

    ROWS_A_GROUP = 500
    SAMPLED = 100  # files whose sizes are asked for, to guess how many rows fill a shard

    def __init__(self, corpus: AudioTable):
        super().__init__(corpus, "a .csv, .tsv or .jsonl file")
        self._corpus = corpus
        self.shard_bytes = corpus.shard_mib * 2**20
        self._form = posixpath.splitext(self.name)[1].lower()
        if self._form not in (".csv", ".tsv", ".jsonl"):
            raise CorpusError(f"corpus.path = '{corpus.path}' is no .csv, .tsv or .jsonl file")
        self._header: list[str] = []
        self._begin = 0  # byte of the first row
        if self._form != ".jsonl":
            with self._lines(0) as lines:
                try:
                    self._header = [name.strip() for name in next(self._split_up(lines), [])]
                except csv.Error as error:
                    raise CorpusError(f"'{self.name}' does not begin with a line of column names ({error})") from error
                self._begin = lines.position
            _check_columns(corpus, [corpus.path_column], self._header, self.name)

    def groups(self) -> list[Group]:
        spans: list[tuple[int, int, set[str]]] = []  # first byte, byte after the last, splits
        start, splits, rows = self._begin, set[str](), 0
        paths, moved = list[str](), set[str]()
        with self._lines(self._begin) as lines:
            for row in self._rows(lines):
                rows += 1
                splits.add(self._split(row))
                if isinstance(row, dict):
                    moved |= self.moved.keys() & {row.get(self._corpus.speaker_column)}
                    if len(paths) < self.SAMPLED:
                        paths.append(row.get(self._corpus.path_column) or "")
                if rows % self.ROWS_A_GROUP == 0:
                    spans.append((start, lines.position, splits))
                    start, splits = lines.position, set()
            spans.append((start, lines.position, splits))
        if not rows:
            raise CorpusError(f"'{self.name}' in {self.storage.url} has no rows")
        self.check_moved(moved)
        sizes = [size for path in paths if (size := self._size(path))] or [0]
        guess = round(sum(sizes) / len(sizes) * min(rows, self.ROWS_A_GROUP))
        return [
            Group(f"{start:015d}-{stop:015d}", split, guess // len(splits))
            for start, stop, splits in spans
            for split in sorted(splits)
        ]

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        start, stop = map(int, group.name.split("-"))
        with self._lines(start) as lines:
            for row in self._rows(lines, stop):
                if self._split(row) != group.split:
                    continue
                if isinstance(row, dict):
                    yield self._utterance(row, group.split)
                else:
                    yield Rejected(f"{self.name}, before byte {lines.position}", "bad_row", row)

    def _split(self, row: dict[str, str | None] | str) -> str:
        """The split of a row; of the table, where the row has none or is none."""
        if isinstance(row, str):
            return self.split(self.name, "")
        told = row.get(self._corpus.split_column) or ""
        return self.split(told if split_of(told) else self.name, row.get(self._corpus.speaker_column) or "")

    def _utterance(self, row: dict[str, str | None], split: str) -> RawUtterance | Rejected:
        corpus = self._corpus
        path = row.get(corpus.path_column)
        if not path:
            return Rejected(f"{self.name}: {row}"[:200], "bad_row", f"{corpus.path_column} is empty")
        stem, suffix = posixpath.splitext(posixpath.normpath(path))
        # What lies beside or above the table has an id without the way up, as no id may be a way up.
        utterance_id = row.get(corpus.id_column) or stem.removeprefix(f"{self.storage.root}/").lstrip("./")
        speaker, told = row.get(corpus.speaker_column) or "", row.get(corpus.split_column)
        if told and not split_of(told):
            return Rejected(utterance_id, "bad_row", f"{corpus.split_column} = '{told}': expected train, dev or test")
        try:
            audio = self.recording(self._place(path))
        except AudioError as error:
            return Rejected(utterance_id, error.reason, error.detail)
        return RawUtterance(
            utterance_id, speaker, split, suffix[1:].lower(), audio, one_line(row.get(corpus.text_column))
        )

    def _place(self, path: str) -> str:
        """A path of the table as this storage takes it. Raises AudioError where it leads out of an object store."""
        place = posixpath.normpath(path)
        if "://" in path or (place.startswith(("/", "..")) and not self.storage.is_local):
            raise AudioError("bad_name", f"'{path}': expected a path below the table's folder")
        return place

    def _size(self, path: str) -> int:
        try:
            return self.storage.size(self._place(path))
        except (AudioError, ValueError, OSError):  # read() will say what it is
            return 0

    # --- rows ---

    @contextmanager
    def _lines(self, start: int) -> Iterator[_Lines]:
        with self.storage.open(self.name) as native:
            native.seek(start)
            yield _Lines(io.BufferedReader(native, BUFFER), start)  # type: ignore[arg-type]  # a raw file in all that is asked

    def _split_up(self, lines: _Lines) -> Iterator[list[str]]:
        if self._form == ".csv":
            return csv.reader(lines)
        return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)  # Common Voice's have quotes that mean nothing

    def _rows(self, lines: _Lines, stop: int | None = None) -> Iterator[dict[str, str | None] | str]:
        """Each row by column, or what is wrong with it; up to byte `stop`. Empty lines are no rows."""
        cut_up = self._split_up(lines)
        while stop is None or lines.position < stop:
            try:
                row = _parsed(next(lines)) if self._form == ".jsonl" else self._named(next(cut_up))
            except StopIteration:
                return
            except csv.Error as error:
                row = str(error)
            if row and isinstance(row, dict) and not all(map(is_text, filter(None, row.values()))):
                row = "not UTF-8"
            if row:
                yield row

    def _named(self, cells: list[str]) -> dict[str, str | None] | str:
        if cells and len(cells) != len(self._header):
            return f"{len(cells)} columns, the header has {len(self._header)}"
        return dict(zip(self._header, cells, strict=True)) if cells else ""


class _Lines:
    """Lines of a byte stream, and how many bytes have been taken."""

    def __init__(self, file: io.BufferedReader, start: int):
        self._file = file
        self.position = start

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE)
        if not line:
            raise StopIteration
        begins, self.position = self.position == 0, self.position + len(line)
        return line.decode("utf-8-sig" if begins else "utf-8", "surrogateescape")


def _parsed(line: str) -> dict[str, str | None] | str:
    """A line of JSONL; numbers become text, as ids and speakers often are numbers."""
    if not line.strip():
        return ""
    try:
        found = msgspec.json.decode(line.encode("utf-8", "surrogateescape"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return str(error)
    if not isinstance(found, dict):
        return f"a JSON {type(found).__name__}, expected an object"
    return {key: value if isinstance(value, str | None) else str(value) for key, value in found.items()}


class ParquetSource(Placed):
    """Parquet files below a folder, or one, with the audio in a column. A group is a row group.

    The audio is Hugging Face's `struct<bytes: binary, path: string>` or plain binary. Without a column of ids an utterance is
    named after its file and row.
    """

    ROWS_AT_A_TIME = 16

    def __init__(self, corpus: Parquet):
        super().__init__(corpus, "a folder of .parquet files, or one")
        self._corpus = corpus
        self.shard_bytes = corpus.shard_mib * 2**20

    def groups(self) -> list[Group]:
        groups = []
        for path, size in self.files((".parquet",)).items():
            groups += self._row_groups(path, size)
        if not groups:
            raise CorpusError(f"'{self.storage.url}' holds no .parquet file that has rows")
        return groups

    def _row_groups(self, path: str, size: int) -> list[Group]:
        with self.storage.open(path) as file:
            try:
                table = pq.ParquetFile(file)
            except pa.ArrowInvalid:  # no Parquet; read() says so in the quarantine table
                return [Group(f"{path}#00000", self.split(path, ""), size)]
            self._check(table, path)
            groups = []
            for number in range(table.num_row_groups):
                rows, splits = table.metadata.row_group(number), self._splits(table, number, path)
                if rows.num_rows:
                    groups += [
                        Group(f"{path}#{number:05d}", split, rows.total_byte_size // len(splits)) for split in splits
                    ]
            return groups

    def _splits(self, table: pq.ParquetFile, number: int, path: str) -> list[str]:
        """The splits in a row group; all that there may be, where its speakers cannot be read."""
        column = self._corpus.speaker_column
        if not self.moved or column not in table.schema_arrow.names:
            return [self.split(path, "")]
        try:
            speakers = table.read_row_group(number, columns=[column])[column].unique().to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            return sorted({self.split(path, ""), *self.moved.values()})
        return sorted({self.split(path, "" if speaker is None else str(speaker)) for speaker in speakers})

    def _check(self, table: pq.ParquetFile, path: str) -> None:
        schema, column = table.schema_arrow, self._corpus.audio_column
        _check_columns(self._corpus, [column], schema.names, path)
        kind = schema.field(column).type
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_binary_view(inner)):
            raise CorpusError(
                f"'{path}': column '{column}' is {kind}; expected binary, or struct<bytes: binary, path: string> as Hugging "
                "Face's. Name another with corpus.audio_column, or embed the audio"
            )

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        path, _, number = group.name.rpartition("#")
        try:
            yield from self._rows(path, int(number), group.split)
        except (pa.ArrowException, OSError) as error:
            with self.storage.open(
                path
            ) as file:  # a storage that fails now raises here; what is left is the file's own fault
                while file.read(BUFFER):
                    pass
            yield Rejected(group.name, "bad_table", f"{error}; what came before is used")

    def _rows(self, path: str, number: int, split: str) -> Iterator[RawUtterance | Rejected]:
        corpus = self._corpus
        with self.storage.open(path) as file:
            table = pq.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False)  # else the row group is fetched whole
            first = sum(table.metadata.row_group(earlier).num_rows for earlier in range(number))
            roles = {
                "audio": corpus.audio_column,
                "id": corpus.id_column,
                "speaker": corpus.speaker_column,
                "text": corpus.text_column,
            }
            there = {role: column for role, column in roles.items() if column in table.schema_arrow.names}
            for batch in table.iter_batches(self.ROWS_AT_A_TIME, [number], list(there.values()), use_threads=False):
                for row in range(batch.num_rows):
                    cells = {role: batch[column][row] for role, column in there.items()}
                    yield from self._utterance(cells, f"{path.removesuffix('.parquet')}/{first:09d}", split)
                    first += 1

    def _utterance(self, cells: dict[str, Any], name: str, split: str) -> Iterator[RawUtterance | Rejected]:
        words, faults = dict.fromkeys(("id", "speaker", "text"), ""), []
        for role in words.keys() & cells.keys():
            try:
                value = cells[role].as_py()
                words[role] = "" if value is None else str(value)
            except UnicodeDecodeError as error:
                reason = "bad_transcript" if role == "text" else "bad_metadata"
                faults.append(Rejected(name, reason, f"{role} is not UTF-8: {error}; the audio is used without"))
        if self.split(name, words["speaker"]) != split:
            return
        yield from faults
        found, path = cells["audio"].as_py(), ""
        if isinstance(found, dict):
            found, path = found["bytes"], found.get("path") or ""
        utterance_id = words["id"] or name
        if found is None:
            said = f"; it names '{path}', which a Parquet file does not hold: embed the audio" if path else ""
            yield Rejected(utterance_id, "no_audio", f"row without bytes{said}")
            return
        suffix = posixpath.splitext(path)[1].lower()
        form = suffix[1:] if suffix in SUFFIXES else MAGIC.get(found[:4], "mp3")
        yield RawUtterance(utterance_id, words["speaker"], split, form, found, one_line(words["text"]))


def _check_columns(corpus: AudioTable | Parquet, needed: list[str], there: list[str], file: str) -> None:
    """A column must be there if it is needed, or if its setting was given."""
    given = [
        getattr(corpus, field.name)
        for field in msgspec.structs.fields(corpus)
        if field.name.endswith("_column") and getattr(corpus, field.name) != field.default
    ]
    absent = [name for name in dict.fromkeys([*needed, *given]) if name not in there]
    if absent:
        raise CorpusError(
            f"'{file}' has no column {', '.join(absent)}; it has {', '.join(there)}. Name them with corpus.…_column"
        )
