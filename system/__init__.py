"""What every room may use: the ground that the others stand on.

Errors and streams, files from strangers, the device, its memory and its BLAS. Of models
and prompts only sizes are known here; nothing of another room is imported.

In the order to read them: ``errors`` (bad input becomes one line and exit status 2),
``startup`` (Ctrl-C and closed streams), ``files`` (what is opened and believed),
``device`` and ``fast_blas`` (what computes), ``memory`` (what is left),
``remembering`` (what was measured here before), ``launched``, ``wire`` and
``ranks`` (the processes of one program on several machines).
"""
