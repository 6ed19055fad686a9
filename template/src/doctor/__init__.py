"""What could go wrong with a run, looked at before it costs anything: one module for each part."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the doctor's page."""

    verdict: str  # OK, WARN, or FAIL: a run would stop, or would have to be thrown away
    what: str
    mend: str = ""  # the command, or what to change
