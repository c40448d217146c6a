"""One harness that checks contestants for equal results, then times them in turns."""
