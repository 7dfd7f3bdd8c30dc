"""Speculative decoding itself: rules and small state, without a model or a file.

p is the target, q the draft. Nothing here knows an architecture, a checkpoint or text;
the loop that uses it is ``decoder.py``.

In the order to read them: ``session`` (what the loop asks of a model), ``sampling``
(from logits to the law of the next token), ``processors`` (rules that look at what came
before), ``acceptance`` (which draft tokens stand), ``samplers`` (drawing and judging,
round after round), ``drafting`` (a model that proposes tokens), ``lookup`` (none that
does), ``beams`` (the steps of a beam search), ``requests`` (what is asked for, and what
comes of it), ``rows`` (a text in a batch), ``groups`` (one that is searched for with
beams), ``rounds`` (a pass of the target, and its verdict), ``trees`` (the same for
groups), ``chances`` and ``costs`` (what drafting brings, and what it takes), ``policy``
(how much is drafted), ``proposing`` (who drafts for which row).
"""
