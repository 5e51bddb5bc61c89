"""Self-distillation of language models: sample, critique, re-score with the critique, learn."""

__version__ = "0.1.0"
