"""The sections, how long each may take, and what it is told."""

import time
from dataclasses import dataclass, field
from typing import Any

#: In the order in which they are run. Their seconds, with --quick and without; None for
#: what the others leave.
SECTIONS: dict[str, tuple[float | None, float | None]] = {
    "machine": (15, 15),
    "exactness": (50, 140),
    "curve": (25, 50),
    "speed": (40, 100),
    "compiled": (15, 30),
    "shapes": (35, 100),
    "suite": (None, None),
}
#: What programs go by from then on; all else is forgotten.
KEPT = "compiled"
#: Seconds of all of them together, with --quick and without: less than is promised, as
#: processes have to begin and to end.
TOTAL = (215.0, 565.0)
#: Seconds that a section may take beyond its share before it is ended.
GRACE = 8.0
#: Seconds below which a section is not begun.
LEAST = 8.0


@dataclass
class Task:
    """What a section is told.

    Attributes:
        seconds: within which it has to be done, from now on.
        before: its result so far, where an earlier run was cut off; or None.
    """

    quick: bool
    seconds: float
    before: dict[str, Any] | None = None
    began: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.began + self.seconds - time.monotonic()
