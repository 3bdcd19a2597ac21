"""Read studies ahead of the network, in child processes that may hang or crash without taking the run along.

Decoding runs in native code on files from elsewhere: a bad one can end the process or never return. So each reader is
a process of its own that takes a folder on stdin and answers with a pickled Volume on stdout; it is killed when it
takes too long and replaced when it died. A plain child process is used rather than multiprocessing, because that
runs the caller's script or notebook again in the child, and its pools lose all work in flight with one crash.
"""

import importlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from cspine_submission.reasons import why

READER = "cspine.dicom:read_series"  # module:function that a reader process calls with the folder
START_LIMIT = 300  # s that a reader process may take to import what it needs


class ReadFailed(Exception):
    """A study that could not be read; its text is the reason for the report."""


class Reader:
    """One reader process, started when it is first needed and again after it died or was killed."""

    def __init__(self):
        self.process = None
        self.log = None

    def read(self, folder, timeout):
        """The Volume in a folder, or ReadFailed with the reason."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self._start()
        self.process.stdin.write(json.dumps(str(folder)).encode() + b"\n")
        self.process.stdin.flush()
        ok, value = self._answer(timeout, f"reading took more than {timeout:g} s and was stopped")
        if not ok:
            raise ReadFailed(value)
        return value

    def close(self):
        """End the process, whatever it is doing."""
        process, self.process = self.process, None  # the run may close it while a thread waits for its answer
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, self.log):
                pipe.close()

    def _start(self):
        # the child finds the modules that this process finds, also in a notebook that changed sys.path
        env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed in close()
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from cspine_submission.reading import serve; serve()", READER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=env,
        )
        self._answer(START_LIMIT, f"the reader process did not start within {START_LIMIT} s")

    def _answer(self, timeout, too_late):
        late = threading.Event()

        def stop(process=self.process):
            late.set()
            process.kill()

        timer = threading.Timer(timeout, stop)
        timer.daemon = True
        timer.start()
        try:
            answer = pickle.load(self.process.stdout)
        except Exception as e:  # noqa: BLE001, cut off in the middle a pickle can raise almost anything
            timer.cancel()
            reason = too_late if late.is_set() else self._last_words(e)
            self.close()
            raise ReadFailed(reason) from None
        timer.cancel()
        if late.is_set():  # answered at the last moment: the process is dying, the answer is whole
            self.close()
        return answer

    def _last_words(self, error):
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return f"the reader process sent what cannot be understood ({why(error)})"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process that read it died ({ended}{'; ' + lines[-1] if lines else ''})"


def read_ahead(folders, workers, timeout):
    """Yield (Volume or ReadFailed, seconds) per folder, in order; at most `workers` + 1 volumes are held at a time."""
    free, readers = queue.SimpleQueue(), [Reader() for _ in range(workers)]
    for r in readers:
        free.put(r)

    def job(folder):
        reader, start = free.get(), time.monotonic()
        try:
            return reader.read(folder, timeout), time.monotonic() - start
        except ReadFailed as e:
            return e, time.monotonic() - start
        except Exception as e:  # noqa: BLE001, no process to be had, a full disk: the loss of this study only
            reader.close()
            return ReadFailed(why(e)), time.monotonic() - start
        finally:
            free.put(reader)

    pool, ahead, folders = ThreadPoolExecutor(workers), deque(), iter(folders)
    try:
        for folder in folders:
            ahead.append(pool.submit(job, folder))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for r in readers:
            r.close()


def serve():
    """A reader process: folders in on stdin, pickled (ok, Volume or reason) out on stdout, until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which closes its readers
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between the answers
    module, function = sys.argv[1].split(":")
    read = getattr(importlib.import_module(module), function)

    def answer(*value):
        pickle.dump(value, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    answer(True, "ready")
    for line in sys.stdin:
        try:
            answer(True, read(json.loads(line)))
        except Exception as e:  # noqa: BLE001, the reason is for the report
            answer(False, why(e))
