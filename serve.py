"""Serve T5 over HTTP in OpenAI's shape, with several tokens per pass of the model.

    python serve.py --model t5-11b --draft-model t5-small

Requests are decoded together, and each of them several tokens at a time. What it does
is in ``serving/``. This file is short so that Python has read it at once: from there on
Ctrl-C is clean.
"""

if __name__ == "__main__":
    import system.startup  # noqa: F401  (first: see there)

from system.errors import InputError, leave, run


def main() -> int:
    """Serve as the command line says; the exit status."""
    try:
        from serving import program
    except ImportError as error:
        if error.name not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise InputError(
            f"{error.name} is missing: pip install -r requirements-serve.txt"
        ) from None
    return program.main()


if __name__ == "__main__":
    # MLX may abort a process that is taken down after a thread of its has computed.
    leave(run(main, "serve.py"))
