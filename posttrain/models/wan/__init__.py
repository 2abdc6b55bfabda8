"""Wan 2.1 and 2.2: the family that a recipe names as `model.family: wan` (see `Family` in posttrain/models/base.py)."""

from posttrain.models.wan.adapters import TARGETS as TARGETS
from posttrain.models.wan.adapters import load_stock_adapter as load_stock_adapter
from posttrain.models.wan.adapters import original_name as original_name
from posttrain.models.wan.card import pipeline_code as pipeline_code
from posttrain.models.wan.loading import bare as bare
from posttrain.models.wan.loading import load as load
from posttrain.models.wan.loading import save_merged as save_merged
from posttrain.models.wan.published import defaults as defaults
from posttrain.models.wan.published import needs_picture as needs_picture
from posttrain.models.wan.shapes import outline as outline

SIDE = 32  # the VAE's 8 or 16 pixels times the transformer's 2 latent cells
FRAMES = 9  # 4k + 1
