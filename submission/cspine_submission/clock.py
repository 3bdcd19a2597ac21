"""When a run will be done, and what to leave out so that it is done in time."""

import math
import re
import threading
import time
from collections import defaultdict, deque

from cspine.presets import CspineError

LATEST = 50  # studies whose times are looked at: the machine of an hour ago says little
RESERVE = 0.05  # of the limit, kept for a study that takes longer than the others, and for writing
LEAST = 5.0  # s of reserve, however short the limit: a process begins before its clock does, and ends after


def seconds(text):
    """A time as a number of seconds: '9h', '8h30m', '45m', '90s', '3600', 3600; CspineError for anything else."""
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", str(text).strip().lower().replace(" ", ""))
    if not found or not any(found.groups()) or not 0 < (s := sum(float(n or 0) * k for n, k in zip(found.groups(), (3600, 60, 1)))) < math.inf:
        raise CspineError(f"{text!r} is no time: write 9h, 8h30m, 45m or a number of seconds above 0")
    return s


def clock(s):
    """Seconds as 0:07:59."""
    return f"{int(s) // 3600}:{int(s) // 60 % 60:02d}:{int(s) % 60:02d}"


class Clock:
    """Knows the limit, what studies have cost at each effort, and which effort the rest can afford."""

    def __init__(self, limit=None, start=None, now=time.monotonic):
        self.now, self.limit = now, math.inf if limit is None else limit
        self.start = now() if start is None else start
        self.reserve = 0 if limit is None else min(max(RESERVE * limit, LEAST), limit / 2)
        self.at_once, self.folds, self.efforts = 1, (1, 1), 4  # of the predictors; of both stages; how many there are
        self.cost = defaultdict(lambda: deque(maxlen=LATEST))  # effort -> (s of a predictor, s by step) of each study
        self.lock = threading.Lock()

    def left(self):
        """Seconds to the limit."""
        return self.limit - (self.now() - self.start)

    def time_to_work(self):
        """Seconds in which studies may still be predicted: the limit less the reserve."""
        return self.left() - self.reserve

    def work_left(self):
        """Seconds until studies in flight are given up: the limit less half of the reserve, in which all is written."""
        return self.left() - self.reserve / 2

    def add(self, effort, took, steps):
        """What a study has cost: seconds that it kept a predictor busy, and the seconds of its steps."""
        with self.lock:
            self.cost[effort].append((took, steps))

    def each(self, effort):
        """Seconds that a study keeps a predictor busy at this effort: measured, or guessed from another; None: not known yet."""
        with self.lock:
            if self.cost[effort]:
                return _mean(took for took, _ in self.cost[effort])
            known = [e for e in range(self.efforts) if self.cost[e]]
            if not known:
                return None
            near = min(known, key=lambda e: abs(e - effort))
            steps = {s: _mean(x.get(s, 0) for _, x in self.cost[near]) for s in ("labels", "probabilities")}
            took = _mean(took for took, _ in self.cost[near])
        rest = max(took - sum(steps.values()), 0)
        return rest + sum(steps[s] * self._share(effort, s) / self._share(near, s) for s in steps)

    def _share(self, effort, step):
        # what is left of a step; the first studies at an effort replace this guess by what they took
        first, second = self.folds
        if step == "probabilities":
            return (0.5 if effort >= 1 else 1) / (second if effort >= 2 else 1)
        return (0.5 if effort >= 3 else 1) / (first if effort >= 2 else 1)

    def effort(self, waiting):
        """The most that `waiting` studies can be given in the time that there is; the least where even that is too much."""
        if self.limit == math.inf:
            return 0
        for effort in range(self.efforts):
            each = self.each(effort)
            if each is None or math.ceil(waiting / self.at_once) * each <= self.time_to_work():
                return effort
        return self.efforts - 1

    def end(self, waiting, effort):
        """Seconds until `waiting` studies are answered at this effort, at most until the limit; None: not known yet."""
        each = self.each(effort)
        return None if each is None else min(math.ceil(waiting / self.at_once) * each, max(self.left(), 0))


def _mean(values):
    values = list(values)
    return sum(values) / len(values)
