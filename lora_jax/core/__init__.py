"""What everything stands on: adapters, their paths, the low-rank maths, files, errors."""
