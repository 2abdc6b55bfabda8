"""What a world is: a module of this package that a recipe names in `world:`."""

PROTOCOL = ("Config", "label")
