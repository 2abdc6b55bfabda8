"""The protocol of this package's modules, which a pretraining recipe names in `model.family`."""

PROTOCOL = ("load",)
