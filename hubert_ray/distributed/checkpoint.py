"""How is training saved so that any number of workers can go on? Every rank writes a share, one seals.

A checkpoint holds each parameter in full with its AdamW moments, in float32, divided over the ranks by parameter: nothing
in it depends on how ZeRO had cut the state. Since every random number of a step comes from the step's number, a step
count, weights and moments are all there is to save. Recovery looks for the newest *sealed* checkpoint on storage, never at
what Ray remembers (a checkpoint that was reported to Ray Train can be lost with the worker that reported it).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import safetensors.torch
import torch
import torch.distributed

from hubert_ray.distributed import zero
from hubert_ray.distributed.zero import ParameterState
from hubert_ray.errors import TrainingError
from hubert_ray.storage import layout
from hubert_ray.storage.filesystem import Storage


def save(trainer: Any, step: int, storage: Storage, folder: str, keep: int) -> None:
    """Writes and seals the checkpoint after `step` steps; older ones beyond `keep` go. Collective."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    path = f"{folder}/{layout.checkpoint(step)}"
    share: dict[str, torch.Tensor] = {}
    for number, state in enumerate(zero.full_state(trainer)):
        if not torch.isfinite(state.value).all():  # every rank sees the whole value, so all of them stop here
            raise TrainingError(
                f"{folder}: '{state.name}' is not finite after {step} steps; no checkpoint is made of it"
            )
        if number % world == rank:
            share[f"value/{state.name}"] = state.value.cpu().contiguous()
            share |= {f"{key}/{state.name}": m.cpu().contiguous() for key, m in (state.moments or {}).items()}
    storage.write(f"{path}/part-{rank:05d}.safetensors", safetensors.torch.save(share))
    torch.distributed.barrier()
    if rank == 0:
        storage.write(f"{path}/{layout.SEAL}", msgspec.json.encode({"step": step, "parts": world}))
        for old in steps(storage, folder)[:-keep]:
            storage.delete(f"{folder}/{layout.checkpoint(old)}/{layout.SEAL}")  # unseal first: never half a checkpoint
            storage.delete(f"{folder}/{layout.checkpoint(old)}")


def steps(storage: Storage, folder: str) -> list[int]:
    """Steps of the sealed checkpoints below an artifact's folder, ascending."""
    sealed = (
        name for name in storage.list(f"{folder}/checkpoints", recursive=True) if name.endswith("/" + layout.SEAL)
    )
    return sorted(int(name.split("/")[0].removeprefix("step-")) for name in sealed)


def load_weights(model: torch.nn.Module, step: int, storage: Storage, folder: str) -> None:
    """Puts the saved values into a model that is not yet in an engine."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for state in _states(step, storage, folder):
            parameters[state.name].copy_(state.value)


def load_optimizer(trainer: Any, step: int, storage: Storage, folder: str) -> None:
    """Puts the saved values and moments into an engine, at whatever number of workers it runs."""
    zero.prepare_moments(trainer, step)
    zero.load_states(trainer, _states(step, storage, folder))


def _states(step: int, storage: Storage, folder: str) -> Iterator[ParameterState]:
    """Every saved parameter, one part in memory at a time; a parameter's tensors all lie in one part."""
    path = f"{folder}/{layout.checkpoint(step)}"
    parts = msgspec.json.decode(storage.read(f"{path}/{layout.SEAL}"))["parts"]
    for part in range(parts):
        tensors = safetensors.torch.load(storage.read(f"{path}/part-{part:05d}.safetensors"))
        for key in tensors:
            kind, _, name = key.partition("/")
            if kind == "value":
                moments = {m: tensors[f"{m}/{name}"] for m in zero.MOMENTS if f"{m}/{name}" in tensors}
                yield ParameterState(name, tensors[key], moments)
