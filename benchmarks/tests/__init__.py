"""Tests of the benchmarks; no test waits for a clock."""
