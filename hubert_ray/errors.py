"""Which errors are the user's to mend? All of these: each says what was found, what was expected, and the way out."""

from __future__ import annotations


class HubertRayError(Exception):
    """Base of every error that a user can cause and mend. Printed without a traceback by the command line."""


class RecipeError(HubertRayError):
    """The recipe, a `--set` or a cluster setting cannot be used as written."""


class StorageError(HubertRayError):
    """A storage place is no folder or bucket, cannot be reached, or holds a damaged file."""


class StaleArtifactError(HubertRayError):
    """An artifact under this name was made (or begun) from other settings or other inputs."""


class UnsealedArtifactError(HubertRayError):
    """An artifact that a stage needs has not been finished."""


class CorpusError(HubertRayError):
    """The source of a corpus is missing, empty, or not laid out as its kind says."""


class AudioError(HubertRayError):
    """One recording cannot be used; `reason` is the word that lands in the quarantine table."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return AudioError, (self.reason, self.detail)


class LabelError(HubertRayError):
    """Labels do not belong to the audio, the recipe or the frame rate they are used with."""


class TrainingError(HubertRayError):
    """Training cannot go on: a loss that is not finite, no usable utterance, too few workers."""
