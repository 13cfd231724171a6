"""Which values make sense at all? Numbers with their bounds, checked wherever a recipe or cluster setting is read in.

What depends on two settings at once is in `loading.py`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Clusters = Annotated[int, Meta(ge=2, le=2**16)]  # labels are uint16
Streams = Annotated[tuple[Clusters, ...], Meta(min_length=2)]  # of each label stream; one stream is a plain number
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
UtteranceSeconds = Annotated[float, Meta(ge=2)]  # shorter, the grid of odd sample rates would leave no choice of cuts
Grid = Annotated[tuple[float, ...], Meta(min_length=1)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all settings: unknown names are refused. A subclass says `frozen` and `kw_only` for itself, since neither
    type checkers nor (for `kw_only`) msgspec let it inherit them."""
