"""How does a model become a DeepSpeed engine, and how is its state read back whole? The only file that knows DeepSpeed.

ZeRO 1 is the default: optimiser state is divided over the workers, weights are not. The optimiser is torch's AdamW, passed
in, so nothing is compiled at start-up. Whatever the stage, `full_state` yields every parameter with its moments in full, in
float32, which is what makes checkpoints independent of the number of workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from hubert_ray.config.cluster import Cluster

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class ParameterState:
    """One parameter in full, float32: its value and AdamW's two moments (None before the first step)."""

    name: str
    value: torch.Tensor
    moments: dict[str, torch.Tensor] | None


def engine(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, cluster: Cluster, accumulation: int, clip_norm: float
) -> Any:
    """A DeepSpeed engine over the initialised process group; weights are as they are in `model`."""
    if next(model.parameters()).device.type == "cpu":  # also where the machine has a GPU that is not this worker's
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed  # slow to import, and wants the accelerator chosen first

    deepspeed.logger.setLevel("ERROR")
    # A shared-memory all-reduce that would be compiled at first use; a killed compile leaves a lock that later runs wait
    # on for ever (torch issue 189245), and gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # rows are ours to count; DeepSpeed only divides by the accumulation steps
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": cluster.zero_stage, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cluster.precision == "bf16"},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]


def full_state(trainer: Any) -> Iterator[ParameterState]:
    """Every trainable parameter in full. Collective: all ranks iterate together, one parameter in memory at a time."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    for name, parameter in _trainable(trainer):
        if trainer.zero_optimization_stage() == 0:
            state = trainer.optimizer.state.get(parameter, {})
            value, moments = parameter.detach().float(), {key: state[key] for key in MOMENTS if key in state}
        else:
            value = safe_get_full_fp32_param(parameter)
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
        yield ParameterState(name, value, moments or None)


def prepare_moments(trainer: Any, step: int) -> None:
    """Makes room for loaded moments: torch's AdamW creates its state at the first step only."""
    zero = trainer.zero_optimization_stage()
    inner = trainer.optimizer if zero == 0 else trainer.optimizer.optimizer
    for group in inner.param_groups:
        for tensor in group["params"]:
            inner.state[tensor] = _empty_state(tensor, step)
    if zero in (1, 2):
        trainer.optimizer._lazy_init_hp_params_optimizer_state()


def _empty_state(tensor: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    """What AdamW keeps of one parameter. Fused kernels want all of it on the parameter's device, the step count too."""
    moments = {key: torch.zeros_like(tensor, dtype=torch.float32) for key in MOMENTS}
    return {"step": torch.full((), float(step), device=tensor.device), **moments}


def load_states(trainer: Any, states: Iterable[ParameterState]) -> None:
    """Sets parameters' float32 values and moments, after `prepare_moments`."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameters = dict(_trainable(trainer))
    for state in states:
        parameter, moments = parameters[state.name], state.moments or {}
        if trainer.zero_optimization_stage() == 0:
            for key, value in moments.items():
                trainer.optimizer.state[parameter][key].copy_(value)
            continue
        safe_set_full_fp32_param(parameter, state.value)
        for key, value in moments.items():
            safe_set_full_optimizer_state(parameter, value, key)


def _trainable(trainer: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in trainer.module.named_parameters() if p.requires_grad]
