"""What a renderer is: a module of this package that a recipe names in `renderer:`."""

PROTOCOL = ("render",)
