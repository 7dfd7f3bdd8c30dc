"""Training: a draft distilled from a target, a pair from scratch, or one together.

Programs for PyTorch, run as ``python training/train.py``; nothing imports them.

In the order to read them: ``corpus`` (what they learn from), ``train``, ``together``,
``tatoeba`` (sentence pairs as training text).
"""
