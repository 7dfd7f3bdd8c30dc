"""What ``make check`` finds out on somebody's machine, and the report of it.

Each section is measured in a process of its own: a device that crashes or hangs costs
that one. The process that starts them imports no MLX.

In the order to read them: ``program`` (what check.py does), ``task`` (the sections,
their time, and what each is told), ``children`` (a section's process, from outside)
and ``child`` (from inside), ``kept`` (check-report.json, and going on from it). The
sections: ``machine``, ``exactness`` with its ``variants`` (the bundled pair in other
dtypes) and ``margins`` (what rounding explains), ``curve``, ``speed``,
``compiled``, ``shapes``, ``suite`` with ``outcomes`` (a plugin of pytest's);
``footprint`` is the memory of all. Then ``findings`` (what is unexpected), ``tables``
and ``report``, made of the JSON alone.
"""
