"""Losses: arrays in, one value per position or example out, in float32.

They know no temperature, no mask and no weight: those, and sums, are the objective's.
"""
