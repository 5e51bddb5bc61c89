"""The loop that trains a solver, and all that belongs to a run.

loop.py                      a run, step by step
solver.py                    student, task, engine and prompts together
questions.py, overlap.py     what a step asks; rollouts of the next step, drawn meanwhile
batch.py                     from judged rollouts to what a step learns from
gradients.py, microbatch.py  scoring, loss and backward in passes of bounded size
held_out.py, metrics.py      evaluations on the way; what a step says of itself
agreement.py                 does the engine sample from the weights that are trained?
checkpoint.py, state_file.py states on disk, and whose they are
run_folder.py                what a run may find in its folder
distributed.py               the ranks that share a step; rank_failures.py: which one failed
interrupt.py, empty_steps.py stopping in good order; steps that teach nothing
divergence.py                numbers that are none
"""
