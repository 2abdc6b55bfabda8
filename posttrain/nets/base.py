"""What a network of this package is: a module that a recipe may name in `model.family`, for pretraining."""

PROTOCOL = ("load",)
