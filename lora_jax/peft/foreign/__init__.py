"""Adapter files of other programs and times, read as PEFT's."""
