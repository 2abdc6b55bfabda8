"""What a method is: a module of this package, or of pretraining/, that a recipe names in `method:`."""

PROTOCOL = ("Config", "DATA", "train")
