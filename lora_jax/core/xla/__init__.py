"""How products are written so that XLA neither widens nor transposes what is large."""
