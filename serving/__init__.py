"""The server: requests in OpenAI's shape, answered several at a time.

Nothing here decodes: what decides about tokens is further down. In reading order:
``arguments`` (flags), ``bodies`` (what a request may say, and what is refused),
``stops`` (where a text is cut), ``jobs`` (what is asked of the worker and told of it),
``worker`` (the thread that has the models), ``replies`` (what is sent, at once or bit
by bit), ``app`` (addresses, keys, limits), ``connection`` (limits for who asks for
nothing), ``metrics``, and ``program``, which puts them together. ``page.html`` is what
a browser gets.
"""
