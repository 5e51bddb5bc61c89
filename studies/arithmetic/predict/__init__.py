"""How well `selfdistill predict` forecasts: cells with known gains, the fit, and cells kept out.

    python -m studies.arithmetic.predict

conditions.py   what is trained, and which conditions the fit never sees
cells.py        measured gains: of the study in docs/results and of runs of its own
measure.py      these runs, and a probe of every condition
fit.py          the law's coefficients, their bootstrap, the scores on cells kept out
page.py         the table and the plot of docs/predict.md
"""
