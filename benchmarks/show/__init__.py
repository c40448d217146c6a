"""Showing figures: tables, plots, one page of HTML, ``RESULTS.md``."""
