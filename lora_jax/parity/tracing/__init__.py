"""Taps inside two models, and where they part."""
