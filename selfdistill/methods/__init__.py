"""Methods: what the self-teacher gets to see, and which loss makes the student follow it.

    method.py         what a method is
    build.py          the configured one
    stepalign.py, refsol.py, peer.py, environment.py     what the teacher sees
    distillation.py   their loss, a divergence; rewarded.py adds the group's rewards to it, and
                      position_weights.py weighs its tokens
    policy_gradient.py     the loss of methods that weigh the sampled tokens instead:
    grpo.py           by the group's rewards; wrong_step.py: where a critic says that it went wrong;
                      contrast.py: by what a right critique says beyond another one
    loss.py           what any loss offers

A new method is a file here, with a function that builds it, its section in config/methods.py (a
class, and its place in `MethodConfig`), and its case in `build_method`. Pages and dry runs call
its context by the method's own name until they are told a better one.
"""
