"""Rewards of a clip that are differentiable in it, one file each; base.py says what they have in common."""
