"""Files, locks, signals, networks and texts of strangers: what may fail beside the maths."""
