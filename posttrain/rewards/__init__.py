"""Differentiable rewards of a clip, one file each; base.py states their protocol."""
