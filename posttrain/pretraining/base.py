"""Modules of this package that train are methods, as those of methods/ are."""

from posttrain.methods.base import PROTOCOL as PROTOCOL
