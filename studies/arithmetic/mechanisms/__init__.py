"""`selfdistill reproduce --study mechanisms`: what the field argues about, in miniature.

arms.py        what is compared, and how much is computed
job_list.py    the jobs of a plan, which the older study's machinery runs (reproduce/jobs.py)
findings.py    what finished jobs say; answers.py: the questions, and what follows from intervals
page.py        the page and the long tables, from page.md; plots.py: the figures
run.py         the command
"""
