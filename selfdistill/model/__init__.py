"""Models as the trainer uses them: weights, packed rows, attention over them, scoring, teachers."""
