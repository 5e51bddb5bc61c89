"""Critics turn a student's attempt into the step-aligned text that the self-teacher sees.

interface.py   Critic, Critique
build.py       the configured critic
scribe.py      an exact one, for tasks whose steps can be written
llm.py         a language model as the critic; textgen/ asks it
"""
