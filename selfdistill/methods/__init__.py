"""Methods: what the self-teacher gets to see, and which loss makes the student follow it.

method.py         what a method is
build.py          the configured one
stepalign.py, refsol.py, peer.py, environment.py     what the teacher sees
grpo.py           no teacher; the loss of the group's rewards
distillation.py   the loss of all methods with a teacher; loss.py: what any loss offers
"""
