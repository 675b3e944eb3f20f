"""Prompts, answers and batches."""
