"""``LoraConfig``, and what may be wrong with one."""
