"""What a run will need, before it starts: `selfdistill train --dry-run`.

estimates.py   memory and time, from shapes
dry_run.py     prompts and estimates of a configuration
"""
