"""The student's own attempts.

engine.py                 what every engine offers; Rollout
transformers_engine.py    samples from the weights that are trained
slab_cache.py             keys and values of its rows, written in place
sampling.py               draws the next token of every row
vllm_engine.py            has weights of its own, which follow the student's
attempts.py               rollouts with the checker's verdicts
spans.py                  from characters of a text back to its tokens
"""
