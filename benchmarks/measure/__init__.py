"""Taking figures: whose turn it is, what a machine can do, where a step's time goes."""
