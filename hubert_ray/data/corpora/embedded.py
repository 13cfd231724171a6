"""How does the synthetic corpus come in? A group is a speaker, whose audio costs a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

from hubert_ray.config.recipe import EmbeddedCorpus
from hubert_ray.data import synthetic
from hubert_ray.data.corpora.source import Group
from hubert_ray.data.shards import RawUtterance, Rejected


class EmbeddedSource:
    """The synthetic corpus, made while it is read."""

    BYTES_PER_UTTERANCE = 60_000

    def __init__(self, corpus: EmbeddedCorpus):
        self._corpus = corpus
        self._speakers = {speaker.id: speaker for speaker in synthetic.speakers(corpus)}
        self.shard_bytes = corpus.shard_mib * 2**20

    def groups(self) -> list[Group]:
        size = self._corpus.utterances_per_speaker * self.BYTES_PER_UTTERANCE
        return [Group(speaker.id, speaker.split, size) for speaker in self._speakers.values()]

    def read(self, group: Group) -> Iterator[RawUtterance | Rejected]:
        for made in synthetic.synthesise(self._speakers[group.name], self._corpus):
            yield RawUtterance(made.utterance_id, made.speaker, made.split, "flac", made.flac, made.text, made.phones)
