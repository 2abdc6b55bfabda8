"""Several processes that train one model: which of them this is, and what ZeRO-2 keeps in pieces.

torchrun, or `accelerate launch` with a file of recipes/launch/, starts them. Without a GPU they talk through gloo.
DeepSpeed's ZeRO-2 (Rajbhandari et al. 2020) gives each process a share of the gradients and of AdamW's moments. Here
they are put together again for a checkpoint, so that a run may be continued by any number of processes, with it or
without.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for what AdamW keeps of a parameter
REMEDY = "use --config_file recipes/launch/ddp.yaml or zero2.yaml, or torchrun --nproc-per-node N"


def process() -> Any:
    """This process among those of the run, an `accelerate.PartialState`; the first call joins them.

    Raises:
        UserError: several were asked for and this one would be alone, or they were to share the model in a way that
            nothing here does.
    """
    from accelerate import PartialState

    for way in ("FSDP", "MEGATRON_LM"):  # accelerate's FSDP trains copies that know nothing of each other on CPUs
        if _flag(f"ACCELERATE_USE_{way}"):
            raise UserError(f"accelerate launch: {way} is not supported; {REMEDY}", "unsupported")
    options: dict[str, Any] = {}
    if cpu := not torch.cuda.is_available() or _flag("ACCELERATE_USE_CPU"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed says that it found no GPU
    if cpu and zero():
        from deepspeed import ops

        ops.__compatible_ops__ = {}  # or it compiles an exchange of its own; gloo's serves
        options["backend"] = "gloo"
    # cpu=True: else each process of several on CPUs thinks that it is alone; but then accelerate forgets DeepSpeed.
    # The others wait while the first films or measures, for longer than the usual ten minutes.
    state = PartialState(cpu=cpu and not zero(), timeout=timedelta(days=7), **options)
    # `accelerate launch` with several CPU processes names a place to meet, and then starts one that is told no rank
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    asked = os.environ.get("WORLD_SIZE", "several" if launched else "1")
    if asked != str(state.num_processes):
        raise UserError(f"{asked} processes were asked for and {state.num_processes} started; {REMEDY}", "unsupported")
    return state


def zero() -> bool:
    """Whether `accelerate launch` was asked for DeepSpeed."""
    return _flag("ACCELERATE_USE_DEEPSPEED")


def _flag(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("true", "1")


def zero_plugin(share: int, accumulate: int, clip: float, bf16: bool) -> Any:
    """What an `Accelerator` tells DeepSpeed.

    Args:
        share: clips in a micro-batch of one process.
        accumulate: micro-batches per step.
        clip: the largest norm of the gradient.
        bf16: whether to compute in it. Weights keep their own type: DeepSpeed's section bf16 would convert them.

    Raises:
        UserError: the launch file asks for more than ZeRO-2.
    """
    from accelerate import DeepSpeedPlugin

    for field in ("config_file", "offload_optimizer_device", "offload_param_device"):
        if (found := os.environ.get(f"ACCELERATE_DEEPSPEED_{field.upper()}", "none")) != "none":
            message = f"accelerate launch: deepspeed's {field} is {found}, which is not supported; leave it out"
            raise UserError(message, "unsupported", field)
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=accumulate, gradient_clipping=clip)
    if plugin.zero_stage != 2:
        message = f"accelerate launch: zero_stage is {plugin.zero_stage}; set 2, see recipes/launch/zero2.yaml"
        raise UserError(message, "unsupported", "zero_stage")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
    plugin.deepspeed_config["torch_autocast"] = {
        "enabled": bf16,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients are exchanged as they are
    }
    return plugin


def optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The `state_dict` that AdamW over `parameters` has in a single process. Under ZeRO-2 every process has to call."""
    if not zero():
        return optimizer.state_dict()
    from deepspeed.utils import safe_get_full_optimizer_state

    adamw = optimizer.optimizer.optimizer  # inside accelerate's, and that inside DeepSpeed's
    [group] = adamw.param_groups
    step: Tensor = adamw.state[group["params"][0]]["step"]
    state = {
        i: {"step": step.clone()} | {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
        for i, parameter in enumerate(parameters)
    }
    return {"state": state, "param_groups": [group | {"params": list(state)}]}


def load_optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter], state: dict[str, Any]) -> None:
    """Put `state`, which came of `optimizer_state`, back; the weights are in place already."""
    if not zero():
        optimizer.load_state_dict(state)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    partitioned = optimizer.optimizer
    partitioned.refresh_fp32_params()  # it steps a copy of its share of the weights
    [group], [saved] = partitioned.optimizer.param_groups, state["param_groups"]
    group.update({name: value for name, value in saved.items() if name != "params"})
    [flat] = group["params"]
    partitioned.optimizer.state[flat] = {"step": state["state"][0]["step"].clone()} | {
        name: torch.zeros_like(flat) for name in MOMENTS
    }
    partitioned._lazy_init_hp_params_optimizer_state()  # which parameter each stretch of them belongs to
    for i, parameter in enumerate(parameters):
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, state["state"][i][name].to(parameter.device), name)
