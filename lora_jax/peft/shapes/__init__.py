"""Weights that PEFT's file holds in another shape: fused, experts, attention."""
