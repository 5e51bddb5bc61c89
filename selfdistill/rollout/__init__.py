"""The student's own attempts.

engine.py                 what every engine offers; Rollout
transformers_engine.py    samples from the weights that are trained
slab_cache.py             keys and values of its rows, written in place
sampling.py               draws the next token of every row
vllm_engine.py            has weights of its own, which follow the student's
vllm_server_engine.py     asks servers, which are handed the student's adapter
vllm_servers.py           shares requests over servers; vllm_requests.py: what both engines ask
attempts.py               rollouts with the checker's verdicts
spans.py                  from characters of a text back to its tokens
"""
