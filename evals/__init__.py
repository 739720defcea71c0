"""Quality evaluations that run on a CPU with small models and texts available offline."""
