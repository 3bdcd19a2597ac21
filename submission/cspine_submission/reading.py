"""Read studies ahead of the networks, in processes that may hang or crash."""

import importlib
import queue
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from cspine_submission.child import Child, Failed
from cspine_submission.reasons import why

READER = "cspine.dicom:read_series"  # module:function that a reader process calls with the folder


def reader(function):
    """What a reader process answers with: the Volume in a folder."""
    module, name = function.split(":")
    read = getattr(importlib.import_module(module), name)
    return "ready", lambda folder: read(folder)


def readers(n):
    """Processes that read."""
    return [Child("cspine_submission.reading:reader", READER, doing="reading") for _ in range(n)]


def read_ahead(folders, readers, timeout):
    """Yield (key, Volume or Failed, seconds) of (key, folder), as they come; a volume more than there are readers is held at most."""
    free, workers = queue.SimpleQueue(), len(readers)
    for r in readers:
        free.put(r)

    def job(key, folder):
        reader, start = free.get(), time.monotonic()
        for last in (False, True):
            try:
                found = reader.ask(folder, timeout() if callable(timeout) else timeout)
            except Failed as e:
                found = e
                if e.died == -9:  # as where memory is short
                    e.ours = True
                    if not last and not reader.closed:
                        continue
            except Exception as e:  # noqa: BLE001, the loss of this study only
                found = Failed(why(e), ours=True)
            break
        free.put(reader)
        return key, found, time.monotonic() - start

    pool, waiting, folders = ThreadPoolExecutor(workers), set(), iter(folders)
    try:
        while True:
            while len(waiting) < workers and (item := next(folders, None)) is not None:
                waiting.add(pool.submit(job, *item))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            while done:
                yield done.pop().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for r in readers:
            r.close()
