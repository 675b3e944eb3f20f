"""Calibration: what decoding costs on this machine, measured, kept and shown."""
