"""Whoever tuning reports to, for tests: what it says is kept."""

from __future__ import annotations


class Record:
    """Which smoke cases are on record."""

    def __init__(self, passed=()):
        self.known = dict.fromkeys(passed, "")

    def passed(self, op, kernel):
        return self.known.get(f"{op} {kernel}") == ""

    def failure(self, op, kernel, found):
        return self.known.get(f"{op} {kernel}", "")

    def note(self, op, kernel, case):
        self.known[f"{op} {kernel}"] = case


class Told:
    """Progress, remembered."""

    def __init__(self):
        self.lines, self.done = [], []

    def begin(self, total, what):
        self.total = total

    def advance(self, done, now):
        self.done.append(done)

    def tell(self, line):
        self.lines.append(line)
