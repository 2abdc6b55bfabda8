"""Open-Sora v1.2, which PISA is built on: the family that a recipe names as `model.family: opensora`.

See `Family` in posttrain/models/base.py. The rest are the published model's own parts, in its own terms.
"""

from posttrain.models.opensora.conditioning import IMAGE_SIZES as IMAGE_SIZES
from posttrain.models.opensora.conditioning import MASK_RATIOS as MASK_RATIOS
from posttrain.models.opensora.conditioning import NUM_FRAMES as NUM_FRAMES
from posttrain.models.opensora.conditioning import apply_mask_strategy as apply_mask_strategy
from posttrain.models.opensora.conditioning import choose_bucket as choose_bucket
from posttrain.models.opensora.conditioning import draw_frame_mask as draw_frame_mask
from posttrain.models.opensora.conditioning import frame_mask as frame_mask
from posttrain.models.opensora.conditioning import image_size as image_size
from posttrain.models.opensora.conditioning import num_frames as num_frames
from posttrain.models.opensora.conditioning import parse_mask_strategy as parse_mask_strategy
from posttrain.models.opensora.loading import bare as bare
from posttrain.models.opensora.loading import load as load
from posttrain.models.opensora.loading import save_merged as save_merged
from posttrain.models.opensora.published import defaults as defaults
from posttrain.models.opensora.published import load_stock_adapter as load_stock_adapter
from posttrain.models.opensora.published import needs_picture as needs_picture
from posttrain.models.opensora.published import original_name as original_name
from posttrain.models.opensora.published import pipeline_code as pipeline_code
from posttrain.models.opensora.rflow import rflow_loss as rflow_loss
from posttrain.models.opensora.rflow import rflow_sample as rflow_sample
from posttrain.models.opensora.rflow import timestep_transform as timestep_transform
from posttrain.models.opensora.shapes import outline as outline
from posttrain.models.opensora.stdit import TARGETS as TARGETS
from posttrain.models.opensora.stdit import STDiT3 as STDiT3
from posttrain.models.opensora.vae import OpenSoraVAE as OpenSoraVAE
from posttrain.models.opensora.vae import TemporalVAE as TemporalVAE

SIDE = 16  # the VAE's 8 pixels times the transformer's 2 latent cells; it takes multiples of 8, and pads
FRAMES = 9  # any number will do
