"""`selfdistill reproduce`, from what is compared to the page of results.

arms.py        what is compared, and how much is computed
job_list.py    the jobs of a plan; budget.py: how long they should take
jobs.py        how one job runs; schedule.py: worker processes that run them
findings.py    what finished jobs say; claims.py: what the paper says, beside it
results.py     the page, from results.md; plots.py and machine.py: its plots and its origin
run.py         the command
"""
