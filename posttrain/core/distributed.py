"""Several processes that train one model: how they connect, and the optimiser state that ZeRO-2 divides.

torchrun, or `accelerate launch` with a file of recipes/launch/, starts the processes. Without a GPU they use gloo.
DeepSpeed's ZeRO-2 (Rajbhandari et al. 2020) gives each process a share of the gradients and of AdamW's moments. This
module joins the shares for a checkpoint, so a run may be continued with any number of processes, with or without
ZeRO-2.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.core.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names for AdamW's state of a parameter
REMEDY = "use --config_file recipes/launch/ddp.yaml or zero2.yaml, or torchrun --nproc-per-node N"


def process() -> Any:
    """The `accelerate.PartialState` of this process; the first call connects the processes of the run.

    Raises:
        UserError: several processes were launched but did not connect, or the launcher asks for FSDP or Megatron.
    """
    from accelerate import PartialState

    for strategy in ("FSDP", "MEGATRON_LM"):  # on CPUs, accelerate's FSDP trains independent copies
        if _flag(f"ACCELERATE_USE_{strategy}"):
            raise UserError(f"accelerate launch: {strategy} is not supported; {REMEDY}", "unsupported")
    options: dict[str, Any] = {}
    if cpu := not torch.cuda.is_available() or _flag("ACCELERATE_USE_CPU"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that there is no GPU
    if cpu and zero():
        from deepspeed import ops

        ops.__compatible_ops__ = {}  # else DeepSpeed compiles its own communication; gloo is enough
        options["backend"] = "gloo"
    # Without cpu=True each of several CPU processes would run alone; with it, accelerate ignores DeepSpeed.
    # While the first process films or measures, the others wait for longer than the default ten minutes.
    state = PartialState(cpu=cpu and not zero(), timeout=timedelta(days=7), **options)
    # `accelerate launch` for several CPU processes sets MASTER_PORT, but then starts one process without a rank
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
    """The DeepSpeed plugin of an `Accelerator`.

    Args:
        share: clips in a micro-batch of one process.
        accumulate: micro-batches per step.
        clip: the largest norm of the gradient.
        bf16: whether to compute in bf16. Weights keep their type, which DeepSpeed's own section `bf16` would change.

    Raises:
        UserError: the launch file asks for more than ZeRO-2.
    """
    from accelerate import DeepSpeedPlugin

    for field in ("config_file", "offload_optimizer_device", "offload_param_device"):
        if (value := os.environ.get(f"ACCELERATE_DEEPSPEED_{field.upper()}", "none")) != "none":
            message = f"accelerate launch: deepspeed's {field} is {value}, which is not supported; leave it out"
            raise UserError(message, "unsupported", field)
    plugin = DeepSpeedPlugin(gradient_accumulation_steps=accumulate, gradient_clipping=clip)
    if plugin.zero_stage != 2:
        message = f"accelerate launch: zero_stage is {plugin.zero_stage}; set 2, see recipes/launch/zero2.yaml"
        raise UserError(message, "unsupported", "zero_stage")
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = share
    plugin.deepspeed_config["torch_autocast"] = {
        "enabled": bf16,
        "dtype": "bfloat16",
        "lower_precision_safe_modules": [],  # gradients are exchanged in their own type
    }
    return plugin


def optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The `state_dict` of AdamW over `parameters`, as in a single process. Under ZeRO-2 every process must call it."""
    if not zero():
        return optimizer.state_dict()
    from deepspeed.utils import safe_get_full_optimizer_state

    adamw = optimizer.optimizer.optimizer  # accelerate's optimizer holds DeepSpeed's, which holds AdamW
    [group] = adamw.param_groups
    step: Tensor = adamw.state[group["params"][0]]["step"]
    state = {
        i: {"step": step.clone()} | {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
        for i, parameter in enumerate(parameters)
    }
    return {"state": state, "param_groups": [group | {"params": list(state)}]}


def load_optimizer_state(optimizer: Any, parameters: Sequence[nn.Parameter], state: dict[str, Any]) -> None:
    """Restore a `state` of `optimizer_state`. Restore the weights first."""
    if not zero():
        optimizer.load_state_dict(state)
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    partitioned = optimizer.optimizer
    partitioned.refresh_fp32_params()  # ZeRO updates its own copy of its share of the weights
    [group], [saved] = partitioned.optimizer.param_groups, state["param_groups"]
    group.update({name: value for name, value in saved.items() if name != "params"})
    [flat] = group["params"]
    partitioned.optimizer.state[flat] = {"step": state["state"][0]["step"].clone()} | {
        name: torch.zeros_like(flat) for name in MOMENTS
    }
    partitioned._lazy_init_hp_params_optimizer_state()  # maps each part of the flat tensor to its parameter
    for i, parameter in enumerate(parameters):
        for name in MOMENTS:
            safe_set_full_optimizer_state(parameter, state["state"][i][name].to(parameter.device), name)
