"""Methods: what the self-teacher gets to see, and which loss makes the student follow it.

    method.py         what a method is
    build.py          the configured one
    stepalign.py, refsol.py, peer.py, environment.py     what the teacher sees
    grpo.py           no teacher; the loss of the group's rewards
    distillation.py   the loss of all methods with a teacher; loss.py: what any loss offers

A new method is a file here, with a function that builds it, its section in config/methods.py (a
class, and its place in `MethodConfig`), and its case in `build_method`. Pages and dry runs call
its context by the method's own name until they are told a better one.
"""
