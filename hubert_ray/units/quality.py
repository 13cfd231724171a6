"""Do the units mean anything? Phone purity, cluster purity and PNMI from counts of (phone, unit) pairs.

HuBERT (Hsu et al. 2021) IV-E, fairseq `examples/hubert/measure_teacher_quality.py`: with p(i, j) the share of frames of
phone i and unit j,
    phone purity   = sum_j max_i p(i, j)     accuracy if each unit is named after its commonest phone
    cluster purity = sum_i max_j p(i, j)     falls as clusters multiply
    PNMI           = I(phone; unit) / H(phone)
Frames are compared every 10 ms; units at 50 Hz count twice, and both sequences end with the shorter one.
"""

from __future__ import annotations

import msgspec
import numpy as np


class Quality(msgspec.Struct, frozen=True):
    """Target quality over `frames` frames of 10 ms."""

    pnmi: float
    phone_purity: float
    cluster_purity: float
    frames: int


class PhoneCounts:
    """Joint counts of phones and units, filled utterance by utterance. Phones are added as they occur."""

    def __init__(self, clusters: int):
        self._clusters = clusters
        self._rows: dict[str, np.ndarray] = {}

    def add(self, phones: list[dict], labels: np.ndarray, frame_rate_hz: int) -> None:
        """Counts one utterance. `phones`: start and end in 16 kHz samples and the phone; `labels`: (F,) unit ids."""
        units_F = np.repeat(labels, 100 // frame_rate_hz)
        for phone in phones:
            start, end = round(phone["start"] / 160), round(phone["end"] / 160)
            name = phone["phone"].rstrip("012")  # lexical stress is not a phone
            row = self._rows.setdefault(name, np.zeros(self._clusters, dtype=np.int64))
            row += np.bincount(units_F[start:end], minlength=self._clusters)

    def phones(self) -> list[str]:
        return sorted(self._rows)

    def table(self) -> np.ndarray:
        """Counts (P, K), phones in sorted order."""
        return np.stack([self._rows[name] for name in self.phones()])

    def quality(self) -> Quality | None:
        """None where no frame has a phone."""
        return quality(self.table()) if self._rows and self.table().sum() else None


def quality(counts_PK: np.ndarray) -> Quality:
    """The three measures of a table of counts with at least one frame."""
    total = int(counts_PK.sum())
    joint_PK = counts_PK / total
    phone_P, unit_K = joint_PK.sum(axis=1), joint_PK.sum(axis=0)
    entropy = -_sum_xlogy(phone_P, phone_P)
    expected_PK = np.outer(phone_P, unit_K)
    information = _sum_xlogy(joint_PK, np.divide(joint_PK, expected_PK, where=joint_PK > 0, out=np.ones_like(joint_PK)))
    return Quality(
        pnmi=float(information / entropy) if entropy > 0 else 0.0,
        phone_purity=float(joint_PK.max(axis=0).sum()),
        cluster_purity=float(joint_PK.max(axis=1).sum()),
        frames=total,
    )


def entropy_bits(counts_K: np.ndarray) -> float:
    """Entropy of a histogram in bits."""
    shares_K = counts_K / counts_K.sum()
    return float(-_sum_xlogy(shares_K, shares_K) / np.log(2))


def _sum_xlogy(weight: np.ndarray, value: np.ndarray) -> float:
    """Sum of weight x ln(value) over the cells with weight."""
    used = weight > 0
    return float((weight[used] * np.log(value[used])).sum())
