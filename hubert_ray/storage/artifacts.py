"""When does a stage run again, and when may its output be trusted?

An artifact is a folder with an identity: the stage, the settings that shape its content, and the identities of its
inputs, hashed to a fingerprint. `_STARTED` claims the folder before work begins, `_SUCCESS` seals it afterwards.

    no claim              -> run
    claimed, same         -> go on from the parts or checkpoints that are there
    sealed, same          -> skip
    claimed or sealed for another identity -> StaleArtifactError that names both values

Worker counts, GPUs and storage places are not part of an identity, so they never make anything stale. The seal has the SHA-256 of
the files that lie in the folder directly, so that one which is replaced or altered later is found; parts in folders below have
their digests where they are listed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from hubert_ray.errors import StaleArtifactError, StorageError, UnsealedArtifactError
from hubert_ray.storage import layout, schemas
from hubert_ray.storage.filesystem import Storage


class Identity(msgspec.Struct, frozen=True):
    """What an artifact is, apart from where and how it was made."""

    stage: str  # kind of stage, such as "pretrain"
    settings: dict[str, Any]  # plain data: the identity-bearing settings
    inputs: dict[str, str]  # name of each input artifact -> its fingerprint
    schema_version: int = schemas.VERSION

    @property
    def fingerprint(self) -> str:
        """The first 16 hex digits of the SHA-256 of the canonical JSON of all fields."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()[:16]


class Seal(msgspec.Struct, frozen=True):
    """Content of `_SUCCESS`."""

    identity: Identity
    fingerprint: str
    facts: dict[str, Any]  # rows, seconds, versions, hardware: what was done, not what was asked
    files: dict[str, str]  # name -> SHA-256


def identity_of(stage: str, settings: dict[str, Any], inputs: dict[str, str]) -> Identity:
    """An identity whose settings went through JSON once, so that it compares equal to one read back."""
    return Identity(stage, msgspec.json.decode(msgspec.json.encode(settings)), inputs)


@dataclass(frozen=True)
class Artifact:
    """A folder on storage together with the identity it must have."""

    storage: Storage
    path: str
    identity: Identity

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def seal_or_none(self) -> Seal | None:
        """The seal, or None where the artifact is not finished.

        Raises StaleArtifactError where the folder is sealed or claimed for another identity.
        """
        found = _there(self)
        if found is None:
            return None
        seal, identity = found
        if identity != self.identity:
            raise StaleArtifactError(self._difference(identity, sealed=seal is not None))
        return seal

    def identity_there(self) -> Identity | None:
        """The identity that the folder is sealed or claimed for, whatever this one's is."""
        found = _there(self)
        return found and found[1]

    def claim(self) -> None:
        """Marks the folder as being worked on for this identity."""
        self.storage.write(self.file(layout.CLAIM), msgspec.json.encode(self.identity, order="deterministic"))

    def seal(self, facts: dict[str, Any]) -> None:
        """Declares the artifact finished. Every other file must have been written before."""
        names = self.storage.scan(self.path)[0].keys() - {layout.CLAIM, layout.SEAL, layout.LOCATIONS}
        files = {name: self.storage.sha256(self.file(name)) for name in sorted(names)}
        seal = Seal(self.identity, self.identity.fingerprint, facts, files)
        self.storage.write(self.file(layout.SEAL), msgspec.json.format(msgspec.json.encode(seal), indent=2))

    def require(self) -> Seal:
        """The seal of an artifact that a stage needs as input."""
        seal = self.seal_or_none()
        if seal is None:
            raise UnsealedArtifactError(
                f"{self.storage.url}: '{self.path}' is needed but has not been finished. Run that stage first, "
                "or `hubert-ray run`, which runs whatever is missing in order."
            )
        return seal

    def altered(self) -> list[str]:
        """Names of the files of a sealed artifact that are gone, or no longer what they were when it was sealed."""

        def is_altered(name: str, digest: str) -> bool:
            try:
                return self.storage.sha256(self.file(name)) != digest
            except FileNotFoundError:
                return True

        return [name for name, digest in self.require().files.items() if is_altered(name, digest)]

    def read_sealed(self, name: str) -> bytes:
        """A file of a sealed artifact. Raises StorageError where it is not what was sealed."""
        data = self.read(name)
        if hashlib.sha256(data).hexdigest() != self.require().files.get(name):
            raise StorageError(
                f"{self.storage.full(self.file(name))} is not the file that was sealed; make it again after "
                f"{self.remove_command()}"
            )
        return data

    def read(self, name: str) -> bytes:
        return self.storage.read(self.file(name))

    def read_json(self, name: str) -> Any:
        return msgspec.json.decode(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        self.storage.write(self.file(name), msgspec.json.format(msgspec.json.encode(value), indent=1))

    def _difference(self, found: Identity, sealed: bool) -> str:
        rows = [
            f"  {name}: {there!r} on storage, {here!r} in the recipe"
            for name, there, here in _differences(_plain(found), _plain(self.identity))
        ]
        corpus = self.path.startswith("corpora/")
        name = "the corpus another name (--set corpus.name=…)" if corpus else "the run another name (--set name=…)"
        return (
            f"'{self.path}' was {'made' if sealed else 'begun'} from other settings than this recipe's:\n"
            + "\n".join(rows)
            + f"\nWays out: give {name}, go back to the old settings, "
            + f"or remove it and then what was made from it: {self.remove_command()}"
        )

    def remove_command(self) -> str:
        """What a user types to make it again from nothing."""
        return f"hubert-ray remove {self.path} --storage '{self.storage.url}'"


def _there(artifact: Artifact) -> tuple[Seal | None, Identity] | None:
    """The seal, if there is one, and the identity of what lies on storage; None where there is neither seal nor claim."""
    for name in (layout.SEAL, layout.CLAIM):
        if not artifact.storage.exists(artifact.file(name)):
            continue
        data = artifact.read(name)
        try:
            seal = msgspec.json.decode(data, type=Seal) if name == layout.SEAL else None
            if seal and seal.fingerprint != seal.identity.fingerprint:
                raise msgspec.ValidationError(f"fingerprint {seal.fingerprint} is not that of the identity beside it")
            return seal, seal.identity if seal else msgspec.json.decode(data, type=Identity)
        except msgspec.DecodeError as error:
            raise StorageError(
                f"{artifact.storage.full(artifact.file(name))} cannot be read ({error}); "
                f"make the artifact again after {artifact.remove_command()}"
            ) from error
    return None


def _plain(identity: Identity) -> dict[str, Any]:
    return {"stage": identity.stage, **identity.settings, "inputs": identity.inputs, "schema": identity.schema_version}


def _differences(there: Any, here: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value there, value here) for every leaf that differs."""
    if isinstance(there, dict) and isinstance(here, dict):
        rows = []
        for key in sorted(there.keys() | here.keys()):
            dotted = f"{name}.{key}" if name else key
            rows += _differences(there.get(key, "(absent)"), here.get(key, "(absent)"), dotted)
        return rows
    return [] if there == here else [(name, there, here)]
