"""The command line of main.py: flags in, answers out.

What a person sees and types is here, and nothing that a program which imports ``pair``
would need; ``benchmark.py`` takes the choice of models.

In the order to read them: ``program`` (what main.py does), ``arguments`` (flags),
``choosing`` (which models), ``rules`` (how tokens are chosen), ``prompts`` (in),
``answers`` (out), ``comparing`` (--compare), ``interactive`` (the prompt loop);
``job`` (--input), whose ``lines`` come in, ask ``questions`` and go to its ``outlet``,
and its ``progress``; ``shared_job`` (--parallel data).
"""
