"""The study of chained arithmetic, on the solver of examples/arithmetic.

demo/        `selfdistill demo`: the solver improves itself in a few minutes, and a page shows how
reproduce/   `selfdistill reproduce`: GRPO, RefSol and StepAlignFB in miniature; writes docs/results
"""
