"""What is looked at after training; nothing here is loaded by it.

tokens.py         attempts token by token: where the teacher disagrees
localisation.py   how local that is, and what advantage masks would keep
alignment.py      an attempt's steps beside those of its critique
run.py            `selfdistill analyze`; draw.py: its attempts, sections.py: its methods
comparison.py     `selfdistill compare`
report/           both as tables and pages
"""
