"""How are files read and written, on a local disk or in an object store?

One small class over pyarrow's file systems: local paths, `s3://…` and `gs://…` URLs (an S3-compatible server is named in
the URL: `s3://bucket/run?endpoint_override=host:port&scheme=http`). A written file is whole or absent, a read gives all bytes
or raises. Of an object store every request is repeated when the server answers 5xx or 429, the connection breaks, the body ends
before its Content-Length, or nothing arrives for 3 seconds: ten times, with waits that double from 50 ms (25 s in all; by itself
pyarrow gives up after 6). gs:// has a client with rules of its own, to which we give the same 25 s. A store that is away for
longer is an error of the piece of work, which is done again (`max_failures`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import tempfile
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from hubert_ray.errors import StorageError
from hubert_ray.storage.cache import RangeCache

HIDDEN = ".part-"  # begins the name of a local file that is being written
ATTEMPTS = 10  # at a request to S3
PATIENCE = timedelta(seconds=25)  # with gs://, whose client would try for 15 minutes


class Storage:
    """A folder, addressed by URL or path; all paths given to its methods are relative to it, with forward slashes.

    `cache` keeps ranges of remote audio on a node's own disk; whoever reads ranges asks it (data/shards.py).
    """

    def __init__(self, url: str, cache: RangeCache | None = None):
        self.url, self.cache = url, cache
        self.filesystem, self.root, kind = _connect(url)
        if not self.root or kind == fs.FileType.File:
            raise StorageError(f"{url}: {'names no bucket' if not self.root else 'is a file, not a folder'}")

    @classmethod
    def of(cls, url: str) -> tuple[Storage, str]:
        """What is at `url`: a folder and "", or a file's folder and its name. Raises StorageError where there is nothing."""
        filesystem, root, kind = _connect(url)
        if kind == fs.FileType.NotFound:
            raise StorageError(f"'{url}': there is no such folder or file")
        if kind != fs.FileType.File:
            return cls(url), ""
        if isinstance(filesystem, fs.LocalFileSystem):
            return cls(posixpath.dirname(root)), posixpath.basename(root)
        path, mark, options = url.partition("?")
        return cls(posixpath.dirname(path) + mark + options), posixpath.basename(path)

    def __repr__(self) -> str:
        return f"Storage({self.url!r})"

    def __reduce__(self):
        # Rebuilt from its URL wherever it lands; a relative local path means the same folder on every worker.
        return Storage, (self.address, self.cache)

    @property
    def address(self) -> str:
        """What names this folder from any working directory."""
        return self.url if "://" in self.url else self.root

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def opens_cheaply(self) -> bool:
        """Whether an open file costs next to nothing: on S3 it is its size; on a disk a descriptor, on gs:// a download."""
        return isinstance(self.filesystem, fs.S3FileSystem)

    def full(self, path: str) -> str:
        return posixpath.join(self.root, path) if path else self.root

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(self.full(path)).type != fs.FileType.NotFound

    def is_folder(self, path: str) -> bool:
        return self.filesystem.get_file_info(self.full(path)).type == fs.FileType.Directory

    def size(self, path: str) -> int:
        """Bytes of a file; 0 where there is none."""
        return self.filesystem.get_file_info(self.full(path)).size or 0

    def read(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError, or OSError where storage fails for good."""
        with self.filesystem.open_input_file(self.full(path)) as file:
            data = file.read()
            if len(data) != file.size():
                raise OSError(
                    f"{self.url}: '{path}' has {file.size()} bytes, {len(data)} came; was it replaced meanwhile?"
                )
            return data

    def sha256(self, path: str) -> str:
        """Of a file's bytes, in hex digits, a little in memory at a time. Raises FileNotFoundError."""
        digest = hashlib.sha256()
        with self.open(path) as file:
            while some := file.read(2**24):
                digest.update(some)
        return digest.hexdigest()

    def open(self, path: str) -> pa.NativeFile:
        """A random-access reader; the caller closes it."""
        return self.filesystem.open_input_file(self.full(path))

    def version(self, path: str) -> str:
        """Tells one state of a file from another. Raises FileNotFoundError."""
        info = self.filesystem.get_file_info(self.full(path))
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(path)
        return f"{info.size}@{info.mtime_ns}"

    def write(self, path: str, data: bytes) -> None:
        """Writes a whole file, replacing what was there; a reader or a crash never sees half of it."""
        with self.create(path) as file:
            file.write(data)

    def create(self, path: str) -> _Writer:
        """A writer for files too large for memory. Use it as a context manager; the file appears when it closes."""
        return _Writer(self, self.full(path))

    def delete(self, path: str) -> None:
        """Removes a file or a whole folder; it may be absent."""
        info = self.filesystem.get_file_info(self.full(path))
        if info.type == fs.FileType.Directory:
            with contextlib.suppress(FileNotFoundError):  # of gs://, which misses the folder's own object in the end
                self.filesystem.delete_dir(info.path)
        elif info.type == fs.FileType.File:
            self.filesystem.delete_file(info.path)

    def upload(self, folder: Path, path: str) -> None:
        """Copies a local folder's files to `path`."""
        for file in _files(folder):
            self.write(posixpath.join(path, file.relative_to(folder).as_posix()), file.read_bytes())

    def scan(self, path: str) -> tuple[dict[str, int], tuple[str, ...]]:
        """What lies in a folder: the bytes of its files, and its folders, by name, sorted; nothing where there is none.

        A file's name that is not UTF-8 is written with surrogates, as Python writes it. Raises StorageError for such a folder.
        """
        files, folders = {}, set()
        # pyarrow's gs:// sees a folder only if there is an object of its name; what lies below tells of all.
        deep = isinstance(self.filesystem, fs.GcsFileSystem)
        selector = fs.FileSelector(self.full(path), recursive=deep, allow_not_found=True)
        for info in self.filesystem.get_file_info(selector):
            folder, below, _ = info.path.removeprefix(f"{self.full(path)}/").partition("/") if deep else ("", "", "")
            if below:
                folders.add(folder)
                continue
            try:
                name = info.base_name
            except UnicodeDecodeError as error:
                name = posixpath.basename(os.fsdecode(error.object))
                if info.type == fs.FileType.Directory:
                    raise StorageError(
                        f"{self.full(path)}: the folder {name!r} has a name that is not UTF-8; rename it"
                    ) from None
            if info.type == fs.FileType.File and not name.startswith(HIDDEN):
                files[name] = info.size
            elif info.type == fs.FileType.Directory:
                folders.add(name)
        return dict(sorted(files.items())), tuple(sorted(folders))

    def walk(self, path: str = "", above: frozenset[str] = frozenset()) -> Iterator[tuple[str, dict[str, int]]]:
        """(folder, bytes of its files by name) for every folder from `path` on, parents first, sorted; one folder in memory (of
        gs://, all that lies below it, listed once more at every depth).

        Symbolic links are followed, except to a folder that they lie in.
        """
        real = os.path.realpath(self.full(path)) if self.is_local else path
        if real in above:
            return
        files, folders = self.scan(path)
        yield path, files
        for folder in folders:
            yield from self.walk(posixpath.join(path, folder), above | {real})

    # Last of the class: in what follows, the annotation `list` would mean this method.
    def list(self, path: str, recursive: bool = False) -> list[str]:
        """Names of the files below `path`, relative to it, sorted; nothing where the folder does not exist."""
        selector = fs.FileSelector(self.full(path), recursive=recursive, allow_not_found=True)
        prefix = self.full(path) + "/"
        found = (info.path for info in self.filesystem.get_file_info(selector) if info.type == fs.FileType.File)
        return sorted(name.removeprefix(prefix) for name in found if not posixpath.basename(name).startswith(HIDDEN))


def _connect(url: str) -> tuple[fs.FileSystem, str, fs.FileType]:
    """The file system that a URL or path names, the path in it, and what is there. Raises StorageError."""
    try:
        if "://" in url:
            filesystem, root = fs.FileSystem.from_uri(url)
            filesystem = _patient(filesystem)
        else:
            filesystem, root = fs.LocalFileSystem(), str(Path(url).expanduser().absolute())
        return filesystem, root.rstrip("/"), filesystem.get_file_info(root).type
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"{url}: not a folder, s3://bucket/… or gs://bucket/… that can be reached ({error})"
        ) from error


class _Writer:
    """A file that appears under its name only when it is closed without an error.

    Written beside its place on a local disk and moved there; for an object store written to a temporary file and uploaded,
    because a stream that is dropped after an error would publish the half that it has. The upload is a stream of ours, closed by
    us: pyarrow's `copy_files` says nothing when the last parts or the completion of an upload fail, and the file is not there.
    """

    def __init__(self, storage: Storage, target: str):
        self._storage = storage
        self._target = target
        if storage.is_local:
            folder, name = posixpath.split(target)
            try:
                storage.filesystem.create_dir(folder, recursive=True)
            except OSError as error:
                raise StorageError(f"{storage.url}: the folder '{folder}' cannot be made ({error})") from error
            self._temporary = posixpath.join(folder, f"{HIDDEN}{name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
        else:
            self._temporary = os.path.join(tempfile.gettempdir(), f"hubert-ray-upload-{uuid.uuid4().hex}")

    def __enter__(self) -> pa.NativeFile:
        self._file = fs.LocalFileSystem().open_output_stream(self._temporary)
        return self._file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        try:
            if kind is None and self._storage.is_local:
                os.replace(self._temporary, self._target)
            elif kind is None:
                self._upload()
        finally:
            if os.path.exists(self._temporary):
                os.remove(self._temporary)

    def _upload(self) -> None:
        with pa.memory_map(self._temporary) as source:
            data = source.read_buffer()
        target = self._storage.filesystem.open_output_stream(self._target)
        target.write(
            data
        )  # in one call: a stream that is dropped half-way, by an interrupt say, would publish its half
        target.close()


def _patient(filesystem: fs.FileSystem) -> fs.FileSystem:
    """The same file system; if it is an object store's, with our retries, which a URL cannot ask for."""
    if isinstance(filesystem, fs.S3FileSystem):
        _, (settings,) = filesystem.__reduce__()
        return fs.S3FileSystem(**settings, retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=ATTEMPTS))
    if isinstance(filesystem, fs.GcsFileSystem):
        _, (settings,) = filesystem.__reduce__()
        return fs.GcsFileSystem(**settings | {"retry_time_limit": PATIENCE})
    return filesystem


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
