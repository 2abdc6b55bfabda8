"""Post-training that makes pretrained video models obey physics."""

from posttrain import _torchvision as _torchvision  # before anything looks for torchvision
