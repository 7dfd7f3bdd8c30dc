"""A server that runs, as a person starts it."""

import re
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path

import serve

PROJECT = Path(serve.__file__).parent


class Running:
    """serve.py in a process of its own.

    Attributes:
        url: where it answers.
        said: its lines on stderr so far.
    """

    def __init__(self, *flags, wait=True, env=None, command=None):
        self.process = subprocess.Popen(
            [*(command or [sys.executable, "serve.py"]), "--port", "0", *flags],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        self.said = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        if wait:
            self.url = re.search(r"http://\S+", self.until("listening"))[0]
            self.until("ready")

    def _read(self):
        for line in self.process.stderr:
            with self._news:
                self.said.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self.said.append("(it has ended)")
            self._news.notify_all()

    def until(self, words):
        """Its first line with these words."""

        def found():
            return [line for line in self.said if words in line]

        with self._news:
            self._news.wait_for(
                lambda: found() or self.said[-1:] == ["(it has ended)"], timeout=120
            )
            assert found(), self.said
            return found()[0]

    def get(self, path):
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name):
        """A number of /metrics."""
        (line,) = re.findall(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.M)
        return float(line)

    def end(self):
        """Its exit status, and what it wrote on stdout."""
        if self.process.poll() is None:
            self.process.terminate()
        out = self.process.stdout.read()
        status = self.process.wait(timeout=60)
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()
        return status, out
