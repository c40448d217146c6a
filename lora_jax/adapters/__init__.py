"""What is done to adapters outside a step: merge, combine, resize, extract, stack, init."""
