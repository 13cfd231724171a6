"""hubert_ray: HuBERT pretraining end to end on Ray, from raw speech to a word error rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubert_ray.speech_model import load
    from hubert_ray.unit_bundle import load_units

__version__ = "0.1.0"
__all__ = ["__version__", "load", "load_units"]


def __getattr__(name: str):
    if name == "load":  # on first use: the command line must answer without loading torch
        from hubert_ray.speech_model import load

        return load
    if name == "load_units":
        from hubert_ray.unit_bundle import load_units

        return load_units
    raise AttributeError(f"module 'hubert_ray' has no attribute {name!r}")
