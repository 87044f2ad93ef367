"""Evaluation on rows later than training, and the gate."""
