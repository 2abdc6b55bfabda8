"""The modules of this package that train are methods, like those of methods/."""

from posttrain.methods.base import PROTOCOL as PROTOCOL
