"""The work on this machine: readers ahead, one predictor per GPU, or as many as a CPU has cores and memory for."""

import os
import queue
import threading
import time
from pathlib import Path

from cspine_submission.child import Failed
from cspine_submission.predicting import Thread, process, stand_in
from cspine_submission.reading import read_ahead
from cspine_submission.reasons import why

STUDY_GB = 3.0  # of memory that one predictor on a CPU takes, with the largest usual study: torch, a bundle, 512 x 512 x 600


class Local:
    """Predicts studies as they come; each is killed when it takes too long, and what died begins anew."""

    def __init__(self, bundle, device, pipeline, workers, timeout, clock, cache=None):
        self.bundle, self.device, self.timeout, self.clock = bundle, device, timeout, clock
        self.workers, self.pipeline, self.cache = workers, pipeline, cache
        self.predictors, self.facts, self.lost = [], None, ""  # lost: why no predictor is left
        self.changed = threading.Condition()
        self.active = self.allowed = 0

    def start(self):
        """What the first predictor says of itself; Failed where there can be none. Starts no other yet."""
        if self.pipeline is not None:
            self.predictors, self.many = [Thread(self.pipeline)], 1
        else:
            cores = _cores()
            self.many = max(1, min(cores, int(_memory_gb() // STUDY_GB)))
            self.threads = max(1, cores // self.many)
            self.predictors = [process(self.bundle, self.device, self.threads, self.cache)]
        self.facts = self.predictors[0].start(max(1, self.clock.time_to_work()) if self.clock.limit < 300 else 300)
        return self.facts

    def results(self, todo, folders, question, prior):
        """Yield (uid, its part of the report) as they come, until all are answered or the time is over."""
        if self.pipeline is None:
            devices = self.facts["devices"] if self.facts["device"] != "cpu" else ["cpu"] * min(self.many, len(todo))
            begun = [p for p in self.predictors[:1] if not p.closed]
            self.predictors = begun + [process(self.bundle, d, self.threads, self.cache) for d in devices[len(begun):]]
        self.clock.at_once = len(self.predictors)
        done, jobs, stop = queue.SimpleQueue(), queue.Queue(maxsize=1), threading.Event()
        waiting, self.active = set(todo), len(self.predictors)
        self.allowed = self.active
        workers = self.workers or max(1, min(4, _cores() // 2))
        threads = [threading.Thread(target=self._feed, args=(todo, folders, workers, jobs, done, stop), daemon=True)]
        threads += [threading.Thread(target=self._drive, args=(i, jobs, done, stop, question, prior, waiting), daemon=True) for i in range(self.active)]
        for t in threads:
            t.start()
        try:
            while waiting and self.clock.work_left() > 0:
                try:
                    uid, study = done.get(timeout=min(1, max(self.clock.work_left(), 0.01)))
                except queue.Empty:
                    if self.active == 0 and done.empty():
                        return
                    continue
                if uid in waiting:
                    waiting.discard(uid)
                    yield uid, study
        finally:
            stop.set()

    def close(self):
        """End all processes."""
        for p in self.predictors:
            p.close()

    def _limit(self):
        return max(0.1, min(self.timeout, self.clock.work_left()))

    def _feed(self, todo, folders, workers, jobs, done, stop):
        volumes = read_ahead(((uid, folders[uid]) for uid in todo if not stop.is_set()), workers, self._limit)
        try:
            for uid, found, took in volumes:
                if isinstance(found, Failed):
                    done.put((uid, {"failed": str(found), "ours": found.ours, "seconds": {"read": took}}))
                while not isinstance(found, Failed) and not stop.is_set():
                    try:
                        jobs.put((uid, found, took), timeout=0.2)
                        break
                    except queue.Full:
                        if self.active == 0:
                            return
                del found
                if stop.is_set():
                    return
        finally:
            volumes.close()
            while self.active and not stop.is_set():  # one end for each that is still there
                try:
                    jobs.put(None, timeout=0.2)
                except queue.Full:
                    continue

    def _drive(self, i, jobs, done, stop, question, prior, waiting):
        free = time.monotonic()
        try:
            while not stop.is_set():
                with self.changed:
                    if self.active > self.allowed:  # the memory does not suffice for so many
                        return
                try:
                    job = jobs.get(timeout=0.2)
                except queue.Empty:
                    continue
                if job is None:
                    return
                uid, volume, read = job
                effort, began = self.clock.effort(len(waiting)), time.monotonic()
                study = self.predict(i, volume, prior, {**question(uid), "effort": effort, "volume": volume, "prior": prior})
                del job, volume
                now = time.monotonic()
                steps = study.pop("steps", {})
                study["seconds"] = {"read": read, "predict": now - began, **steps}
                if effort:
                    study["effort"] = effort
                if "failed" not in study:
                    self.clock.add(effort, now - free, steps)
                free = now
                done.put((uid, study))
        except Exception as e:  # noqa: BLE001, one predictor less; the report says why if it was the last
            self.lost = why(e)
        finally:
            with self.changed:
                self.active -= 1
                self.changed.notify_all()
            self.predictors[i].close()

    def predict(self, i, volume, prior, asked):
        """Ask a predictor, and again: with fewer beside it where memory was short, on a new one where the old one broke."""
        for last in (False, False, True):
            predictor = self.predictors[i]
            try:
                predictor.start()
            except Failed as e:
                self.lost = str(e)
                if last:
                    raise
                continue
            try:
                study = predictor.ask(asked, self._limit())
            except Failed as e:
                out_of_memory, broken, reason = e.died == -9, e.died is not None, str(e)
                study = stand_in(prior, reason, volume)
            else:
                out_of_memory, broken = study.pop("memory", False), study.pop("broken", False)
                if study["status"] != "prior":
                    return study
            if last or not (out_of_memory or broken):
                break
            if out_of_memory and not self._fewer():
                if not broken:
                    break
            if broken:  # a process that died has ended already; one whose GPU broke has not
                predictor.close()
                if self.pipeline is None:
                    device = "cpu" if getattr(predictor, "again", False) else predictor.args[1]
                    self.predictors[i] = process(self.bundle, device, self.threads, self.cache)
                    self.predictors[i].again = True
        return {**study, "failed": study["reason"], "ours": True}

    def _fewer(self):
        """One predictor less, for good; True as soon as another has ended, False if this is the only one."""
        with self.changed:
            if self.allowed <= 1:
                return False
            self.allowed -= 1
            self.changed.wait_for(lambda: self.active <= self.allowed, timeout=self._limit())
            self.clock.at_once = self.allowed
            return True


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
