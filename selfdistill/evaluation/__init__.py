"""How good a solver is.

scores.py       Pass@k, Maj@k, Avg@k of judged attempts
intervals.py    95 % intervals of means over problems
resampling.py   those of ratios, and of scores over seeds and problems
tables.py       results as tables
"""
