"""Open-Sora v1.2, which PISA is built on: the family that a recipe names as `model.family: opensora`."""

from posttrain.models.opensora.conditioning import apply_mask_strategy as apply_mask_strategy
from posttrain.models.opensora.conditioning import choose_bucket as choose_bucket
from posttrain.models.opensora.conditioning import frame_mask as frame_mask
from posttrain.models.opensora.conditioning import image_size as image_size
from posttrain.models.opensora.conditioning import num_frames as num_frames
from posttrain.models.opensora.conditioning import parse_mask_strategy as parse_mask_strategy
from posttrain.models.opensora.loading import bare as bare
from posttrain.models.opensora.loading import load as load
from posttrain.models.opensora.loading import save_merged as save_merged
from posttrain.models.opensora.rflow import rflow_loss as rflow_loss
from posttrain.models.opensora.rflow import rflow_sample as rflow_sample
from posttrain.models.opensora.rflow import timestep_transform as timestep_transform
from posttrain.models.opensora.stdit import TARGETS as TARGETS
from posttrain.models.opensora.stdit import STDiT3 as STDiT3
from posttrain.models.opensora.vae import OpenSoraVAE as OpenSoraVAE
from posttrain.models.opensora.vae import TemporalVAE as TemporalVAE
