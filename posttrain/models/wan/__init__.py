"""Wan 2.1 and 2.2: the family that a recipe names as `model.family: wan`."""

from posttrain.models.wan.model import bare as bare
from posttrain.models.wan.model import load as load
from posttrain.models.wan.model import save_merged as save_merged
