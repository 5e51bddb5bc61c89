"""Models as the trainer uses them.

folder.py, weights.py      loading one whole; its trained weights
adapters.py                LoRA
layout.py, scoring.py      packed rows of prompts and completions; one pass over them
attention/                 attention over the packed rows
lm_head.py                 how hidden states become logits
teacher.py, following_teacher.py   whose weights the self-teacher uses
sharding.py, parts.py      weights spread over ranks; tensors in parts
device.py                  where models live
randomness.py              no pass may be random; activation checkpointing
float32_sum.py             gradients of embeddings, added up in float32
"""
