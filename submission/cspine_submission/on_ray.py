"""The work on a cluster: each of Ray Data's workers has a reader and a predictor of its own, and does what Local does."""

from cspine.cluster import cluster_size, map_on_ray
from cspine_submission.child import Child, Failed
from cspine_submission.clock import Clock
from cspine_submission.local import Local
from cspine_submission.predicting import process


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
        items = [(uid, folders[uid], {**question(uid), "prior": prior}) for uid in todo]
        for found in map_on_ray(study_worker, (self.bundle, self.device, self.timeout, reading.READER, predicting.PIPELINE), items):
            yield found
            if self.clock.work_left() <= 0:
                return

    def close(self):
        """Ray ends its workers with the run."""


def study_worker(bundle, device, timeout, reader, pipeline):
    """Made once in a worker: the function that reads and predicts one study."""
    from cspine_submission import predicting
    predicting.PIPELINE = pipeline
    local = Local(bundle, device, None, 1, timeout, Clock())
    local.threads, local.allowed, local.active = 1, 1, 1
    local.predictors = [process(bundle, device, 1)]
    reading = Child("cspine_submission.reading:reader", reader, doing="reading")

    def work(item):
        uid, folder, asked = item
        began = local.clock.now()
        try:
            volume = reading.ask(folder, timeout)
        except Failed as e:
            return uid, {"failed": str(e), "ours": e.ours, "seconds": {"read": local.clock.now() - began}}
        read = local.clock.now() - began
        try:
            study = local.predict(0, volume, asked["prior"], {**asked, "effort": 0, "volume": volume})
        except Failed as e:  # no predictor can be made on this worker
            study = {"failed": str(e), "ours": True}
        return uid, {**study, "seconds": {"read": read, "predict": local.clock.now() - began - read, **study.pop("steps", {})}}

    return work
