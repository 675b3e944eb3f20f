"""Losses: arrays in, ``(sum, count)`` in float32 out."""
