"""Scores as the authors of each benchmark define them. Plain functions over plain data; no torch."""
