"""What training will bring, before it starts: `selfdistill predict`.

probe.py      a few hundred rollouts: how far student and self-teacher are apart
law.py        from a probe and a budget to a forecast of the gain, as fitted on a miniature
advice.py     which method and which mask to begin with
unseen.py     settings that no law was fitted to
forecast.py   all of it for one configuration
tables.py     and as tables
"""
