"""The work on a cluster: each of Ray Data's workers has a reader and a predictor of its own, and does what Local does."""

import math
import queue
import threading
import time

from cspine.cluster import cluster_size, map_on_ray
from cspine.presets import CspineError
from cspine_submission.child import Failed
from cspine_submission.clock import Clock
from cspine_submission.local import Local, Slot
from cspine_submission.predicting import process
from cspine_submission.reasons import why


class OnRay:
    """Predicts studies on the workers of a Ray cluster; a worker that dies is begun anew, with the study that it was at."""

    def __init__(self, bundle, device, timeout, clock):
        self.bundle, self.device, self.timeout, self.clock, self.lost = bundle, device, timeout, clock, ""

    def start(self):
        """What a predictor on this machine says of itself; CspineError where there is no Ray."""
        cpus, gpus = cluster_size()
        self.clock.at_once = gpus or cpus
        first = process(self.bundle, self.device, 1)
        try:
            return first.start()
        finally:
            first.close()

    def results(self, todo, folders, question, prior):
        """Yield (uid, its part of the report) as they come, until all are answered or the time is over."""
        from cspine_submission import predicting, reading
        items, found = [(uid, folders[uid], {**question(uid), "prior": prior}) for uid in todo], queue.SimpleQueue()
        deadline = time.time() + self.clock.work_left()  # of all machines, as far as their clocks agree

        def collect():
            try:
                for result in map_on_ray(study_worker, (self.bundle, self.device, self.timeout, deadline, reading.READER, predicting.PIPELINE), items):
                    found.put(result)
            except Exception as e:  # noqa: BLE001, what the cluster has not answered gets the prior, with this reason
                self.lost = str(e) if isinstance(e, CspineError) else why(e)
            found.put(None)

        threading.Thread(target=collect, daemon=True).start()
        while self.clock.work_left() > 0:
            try:
                result = found.get(timeout=min(1, max(self.clock.work_left(), 0.01)))
            except queue.Empty:
                continue
            if result is None:
                return
            yield result

    def close(self):
        """Ray ends its workers with the run."""


def study_worker(bundle, device, timeout, deadline, reader, pipeline):
    """Made once in a worker: the function that reads and predicts one study."""
    from cspine_submission import predicting, reading
    predicting.PIPELINE, reading.READER = pipeline, reader
    clock = Clock(None if deadline == math.inf else max(deadline - time.time(), 0.1))
    clock.reserve = 0  # that of the run is in the deadline
    local = Local(bundle, device, None, 1, timeout, clock)
    local.active = 1
    slot = Slot(lambda d: process(bundle, d, 1), device)
    [reads] = reading.readers(1)

    def work(item):
        uid, folder, asked = item
        began = clock.now()
        if clock.work_left() <= 0:
            return uid, {"failed": "the time limit was reached before its turn"}
        try:
            volume = reads.ask(folder, min(timeout, max(clock.work_left(), 0.1)))
        except Failed as e:
            return uid, {"failed": str(e), "ours": e.ours, "seconds": {"read": clock.now() - began}}
        read = clock.now() - began
        try:
            study = local.predict(slot, {**asked, "effort": 0, "volume": volume}, (uid, volume, read))
        except Failed as e:  # no predictor can be made on this worker
            study = {"failed": str(e), "ours": True}
        return uid, {**study, "seconds": {"read": read, "predict": clock.now() - began - read, **study.pop("steps", {})}}

    return work
