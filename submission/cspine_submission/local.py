"""The work on this machine: readers ahead, one predictor per GPU, or as many as a CPU has cores and memory for."""

import os
import queue
import threading
import time
from collections import deque
from pathlib import Path

from cspine_submission.child import Failed
from cspine_submission.predicting import Thread, process, stand_in
from cspine_submission.reading import read_ahead, readers
from cspine_submission.reasons import why

STUDY_GB = 3.0  # of memory that one predictor on a CPU takes, with the largest usual study: torch, a bundle, 512 x 512 x 600
TRIES = 3  # of a study that takes a predictor along: on a GPU the last one is on the CPU


class Slot:
    """A place for a predictor: its device, and the process that is there now."""

    def __init__(self, make, device):
        self.make, self.home, self.rescued = make, device, 0  # rescued: studies in a row that only the CPU could answer
        self.predictor = make(device)

    def renew(self, device):
        """End the process, and have another."""
        self.predictor.close()
        self.predictor = self.make(device)

    def answered(self, on_cpu):
        """A GPU that fails one study is tried again with the next; one that fails two in a row is left alone."""
        if not on_cpu:
            self.rescued = 0
            return
        self.rescued += 1
        if self.rescued >= 2:
            self.home = "cpu"  # where the predictor is now
        else:
            self.renew(self.home)


class Local:
    """Predicts studies as they come; each is killed when it takes too long, and what died begins anew."""

    def __init__(self, bundle, device, pipeline, workers, timeout, clock, cache=None):
        self.bundle, self.device, self.pipeline, self.cache = bundle, device, pipeline, cache
        self.workers, self.timeout, self.clock = workers, timeout, clock
        self.many = self.threads = 1  # predictors on a CPU, and the threads of each
        self.slots, self.readers, self.facts = [], [], None
        self.lost = ""  # why no predictor is left
        self.changed, self.stop, self.active, self.again = threading.Lock(), threading.Event(), 0, deque()
        self.pending = 0  # studies that were read and are not answered yet, whoever has them

    def _make(self, device):
        return Thread(self.pipeline) if self.pipeline is not None else process(self.bundle, device, self.threads, self.cache)

    def start(self):
        """What the first predictor says of itself; Failed where there can be none. Starts no other yet."""
        if self.pipeline is None:
            self.many = max(1, min(_cores(), int(_memory_gb() // STUDY_GB)))
            self.threads = max(1, _cores() // self.many)
        said = ""
        for device in (self.device, self.device, "cpu"):
            slot = Slot(self._make, device)
            self.slots = [slot]
            try:
                self.facts = slot.predictor.start(max(0.5, min(300, self.clock.time_to_work())))
                break
            except Failed as e:
                slot.predictor.close()
                if self.device is not None or self.pipeline is not None or device == "cpu" or e.expected or self.clock.time_to_work() <= 1:
                    raise
                said = f"{e}: the CPU computes instead"
        if device == "cpu" and self.device is None and said:
            self.facts = {**self.facts, "note": said}
        return self.facts

    def results(self, todo, folders, question, prior):
        """Yield (uid, its part of the report) as they come, until all are answered or the time is over."""
        if self.pipeline is None:
            devices = self.facts["devices"] if self.facts["device"] != "cpu" else ["cpu"] * self.many
            begun = [s for s in self.slots[:1] if not s.predictor.closed]
            self.slots = begun + [Slot(self._make, d) for d in devices[len(begun) : len(todo)]]
        for slot, device in zip(self.slots, self.facts["devices"]):
            slot.home = device
        self.stop, self.pending = threading.Event(), 0  # anew: a page may ask for a few more
        self.again.clear()
        self.active = self.clock.at_once = len(self.slots)
        self.readers = readers(self.workers or max(1, min(4, _cores() // 2)))
        done, jobs, fed, waiting = queue.SimpleQueue(), queue.Queue(maxsize=1), threading.Event(), set(todo)
        asked = (question, prior, waiting)
        threads = [threading.Thread(target=self._feed, args=(todo, folders, jobs, done, fed), daemon=True)]
        threads += [threading.Thread(target=self._drive, args=(slot, jobs, done, fed, asked), daemon=True) for slot in self.slots]
        for t in threads:
            t.start()
        try:
            while waiting:
                in_time = self.clock.work_left() > 0
                try:
                    uid, study = done.get(timeout=min(0.5, self.clock.work_left())) if in_time else done.get_nowait()
                except queue.Empty:
                    if not in_time or (self.active == 0 and done.empty()):
                        return
                    continue
                if uid in waiting:
                    waiting.discard(uid)
                    yield uid, study
        finally:
            self._end()

    def _end(self):
        self.stop.set()
        for p in [*self.readers, *(s.predictor for s in self.slots)]:
            p.close()

    def close(self):
        """End all processes."""
        self._end()

    def _limit(self):
        return max(0.1, min(self.timeout, self.clock.work_left()))

    def _feed(self, todo, folders, jobs, done, fed):
        """Hand what was read to whoever is free, and say what could not be read."""
        try:
            for uid, found, took in read_ahead(((uid, folders[uid]) for uid in todo), self.readers, self._limit):
                if isinstance(found, Failed):
                    done.put((uid, {"failed": str(found), "ours": found.ours, "seconds": {"read": took}}))
                else:
                    with self.changed:
                        self.pending += 1
                while not isinstance(found, Failed) and not self.stop.is_set() and self.active:
                    try:
                        jobs.put((uid, found, took, 0), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                del found
                if self.stop.is_set() or not self.active:
                    return
        except Exception as e:  # noqa: BLE001, what was not handed out gets the prior, with this reason
            self.lost = why(e)
        finally:
            fed.set()

    def _next(self, jobs, fed):
        """A job that another has given back, or the next one; None where there is none left."""
        while not self.stop.is_set():
            with self.changed:
                if self.again:
                    return self.again.popleft()
            try:
                return jobs.get(timeout=0.2)
            except queue.Empty:
                with self.changed:  # not while another has a study that it may have to give back
                    if fed.is_set() and not self.pending:
                        self.active -= 1
                        return None
        return None

    def _drive(self, slot, jobs, done, fed, asked):
        """Answer studies on one slot until there are none left, or the slot is."""
        question, prior, waiting = asked
        free, held = time.monotonic(), None
        try:
            while (held := self._next(jobs, fed)) is not None:
                uid, volume, read, tries = held
                effort, began = self.clock.effort(len(waiting)), time.monotonic()
                asking = {**question(uid), "effort": effort, "volume": volume, "prior": prior}
                study = self.predict(slot, asking, (uid, volume, read), tries)
                if study is None:  # for those that are left; there is one fewer from here on
                    return
                del volume
                held = None
                now = time.monotonic()
                steps = study.pop("steps", {})
                study["seconds"] = {"read": read, "predict": now - began, **steps}
                if effort:
                    study["effort"] = effort
                if "failed" not in study:
                    self.clock.add(effort, now - free, steps)
                free = now
                done.put((uid, study))
                with self.changed:
                    self.pending -= 1
        except Exception as e:  # noqa: BLE001, one predictor less; the report says why if it was the last
            self.lost = str(e) if isinstance(e, Failed) else why(e)
            with self.changed:
                self.active -= 1
                if held is not None:
                    self.again.append((*held[:3], held[3] + 1))
        finally:
            slot.predictor.close()

    def _give_back(self, held):
        """Leave a study to another slot, and end this one; False where it is the last."""
        with self.changed:
            if self.active <= 1:
                return False
            self.active -= 1
            self.clock.at_once = self.active
            self.again.append(held)
            return True

    def predict(self, slot, asked, held, tries=0):
        """A study's answer by a slot: again, where its process died; None where it was left to another slot, since memory is short."""
        while True:
            tries += 1
            most = TRIES if slot.home not in (None, "cpu") else TRIES - 1
            last = tries >= most or self.stop.is_set()
            try:
                slot.predictor.start()
            except Failed:
                if last or self.active > 1 or self.pipeline is not None:
                    raise  # the slot is lost, and the study is another's
                slot.renew(slot.home)
                continue
            on_cpu = slot.home not in (None, "cpu") and slot.predictor.args[1] == "cpu"
            try:
                study = slot.predictor.ask(asked, self._limit())
            except Failed as e:
                memory, broken = e.died == -9, e.died is not None
                study = stand_in(asked["prior"], str(e), asked["volume"])
            else:
                memory, broken = study.pop("memory", False), study.pop("broken", False)
            if study["status"] != "prior":
                if on_cpu:
                    study["notes"] = [*study["notes"], f"{slot.home} failed with it: predicted on the CPU"]
                slot.answered(on_cpu)
                return study
            if memory and not last and self._give_back((*held, tries)):
                return None
            if last or self.pipeline is not None or not (broken or memory):
                break
            slot.renew("cpu" if tries == TRIES - 1 else slot.home)
        if self.pipeline is None and not self.stop.is_set() and (broken or on_cpu):
            slot.renew(slot.home)
        return {**study, "failed": study["reason"], "ours": True}


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb():
    """Memory that is free, in GB: of the machine and of the container that we run in; without a word of either, 8."""
    free = [8e9]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")] or free
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        free += [] if limit == "max" else [float(limit) - used]
    except (OSError, ValueError, IndexError):  # another system, or an older kernel
        return min(free) / 1e9
    return min(free) / 1e9
