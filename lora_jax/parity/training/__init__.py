"""Steps and runs of both frameworks beside each other."""
