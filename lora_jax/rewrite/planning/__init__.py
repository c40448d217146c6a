"""``plan``: which parameters a configuration means, and what the rewriter will do to each."""
