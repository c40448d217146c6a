"""A training step compiled for an accelerator that is not here: memory, FLOPs, collectives."""
