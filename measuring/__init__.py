"""How fast a pair is, and beside which others: what benchmark.py is made of.

Nothing here is needed to answer a prompt.

In the order to read them: ``arguments`` (flags), ``baselines`` (other programs),
``simulation`` (a pair that exists only as shapes), ``variants`` (all of them as ways to
answer a prompt), ``timing`` (their seconds, in turn), ``figures`` (speed-up and its
interval, what theory expects), ``batches`` (lines per second), ``calibration`` (what
rounds cost), ``load`` (many clients of a server), ``servers`` (which start and end),
``their_server`` (the usual one), ``table`` and ``plot``, ``prompts`` and ``machine``
(what is measured, on what).
"""
