"""Scores as the authors of each benchmark define them. Plain functions over plain data; no torch.

vqav2.py, gqa.py, nlvr2.py   records in, official scores out
tally.py                     the values behind every score, each with its cluster
bootstrap.py                 95% intervals, and paired differences
items.py                     the score of each question of a run, as a file
submission.py                what must hold before predictions leave the house
"""
