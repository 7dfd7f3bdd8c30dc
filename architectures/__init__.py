"""Models behind one session: what each architecture is, how it is loaded and run.

T5 itself is ``model.py``, at the top. Here is what else there is to know of it, and
decoder-only models through mlx-lm. ``registry`` is the one place that decides which is
which; nothing here knows of drafts or of decoding.

In the order to read them: ``loading`` (what there is to choose), ``registry``; for T5
``t5`` (loading), ``t5_checkpoint`` (its tensors' names), ``t5_session`` (a batch's
state), ``parameters`` (shapes, quantization), ``slim`` (small ones on a CPU), ``parts``
and ``parallel`` (what each of several ranks has of one, and how they run it); for the
others ``causal``, ``verified`` (which are known to be right), ``rotary`` (their
position embeddings), ``causal_model`` and ``causal_layers`` (loading, and what mlx-lm's
lack), ``causal_session`` and ``row_cache`` (a batch's state).
"""
