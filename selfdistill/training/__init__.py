"""The loop that trains a solver, and all that belongs to a run."""
