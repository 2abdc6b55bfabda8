"""The protocol of this package's training modules: they are methods, like those of methods/."""

from posttrain.methods.base import PROTOCOL as PROTOCOL
