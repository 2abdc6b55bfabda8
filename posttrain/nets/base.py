"""The protocol of the modules in this package. A pretraining recipe names one in `model.family`."""

PROTOCOL = ("load",)
