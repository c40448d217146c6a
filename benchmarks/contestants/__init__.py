"""The layer with LoRA by everybody who competes."""
