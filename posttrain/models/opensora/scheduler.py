"""Open-Sora's sampling times (0 to 1000) and Euler step as flow.sample asks for them, in our sign: v = eps - z0."""

from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from posttrain.models.opensora.rflow import timestep_transform


class RFlowScheduler(SchedulerMixin, ConfigMixin):
    """t_i = 1000 (1 - i / steps), transformed for the clip; z -= v (t_i - t_(i+1)) / 1000.

    Args:
        scale: a factor of the transform's r.
        use_timestep_transform: whether times depend on the clip at all.

    Attributes:
        clip: (pictures, height, width) of what is sampled; None: times are not transformed.
    """

    order = 1

    @register_to_config
    def __init__(
        self, num_train_timesteps: int = 1000, scale: float = 1.0, use_timestep_transform: bool = True
    ) -> None:
        self.clip: tuple[int, int, int] | None = None
        self.timesteps: Any = torch.empty(0)
        self._lengths: list[float] = []
        self._done = 0

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose so many times."""
        t = torch.tensor([(1 - i / num_inference_steps) * 1000 for i in range(num_inference_steps)])
        if self.clip is not None and self.config.use_timestep_transform:
            t = timestep_transform(t, *self.clip, scale=self.config.scale)
        self._lengths = ((t - torch.cat([t[1:], torch.zeros(1)])) / 1000).tolist()
        self._done = 0
        self.timesteps = t.to(device)

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = False
    ) -> tuple[Tensor, ...]:
        """(latents at the next time,); called once for each of `timesteps`, in order."""
        length = self._lengths[self._done]
        self._done += 1
        return (sample - model_output * length,)
