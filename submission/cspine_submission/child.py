"""Child processes that answer one question at a time, and may hang or crash without taking the run along.

Decoding and networks run in native code, on files from elsewhere: a bad one can end the process or never return. So the
work is done in processes of our own, killed when they take too long and replaced when they died. Plain child processes
are used rather than multiprocessing, because that runs the caller's script or notebook again in the child, and its
pools lose all work in flight with one crash. What passes between the two is pickled by ourselves, for ourselves.
"""

import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading

from cspine.presets import CspineError
from cspine_submission.reasons import why

START_LIMIT = 300  # s that a process may take to import what it needs, and to make itself ready


class Failed(Exception):
    """A question that was not answered; its text is the reason for the report."""

    def __init__(self, reason, died=None, ours=False, expected=False):
        super().__init__(reason)
        self.died = died  # the exit status, negative for a signal, where the process ended by itself
        self.ours = ours  # no study's fault: the process could not even start, or the memory did not suffice
        self.expected = expected  # an error of our own, whose sentence says all there is to say


class Child:
    """A process that is started when it is first needed, and again after it died or was killed."""

    def __init__(self, factory, *args, doing="working"):
        self.factory, self.args, self.doing = factory, args, doing  # 'module:function', which gives the function that answers
        self.process = self.log = self.ready = None
        self.closed = False
        self.lock = threading.Lock()

    def start(self, timeout=START_LIMIT):
        """What the factory says of itself, once; Failed where it cannot start."""
        if self.process is None or self.process.poll() is not None:
            self._end()
            # the child finds the modules that this process finds, also in a notebook that changed sys.path
            env = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
            with self.lock:  # not while the run is being closed: nobody would end it
                if self.closed:
                    raise Failed("the run was stopped", ours=True)
                try:
                    self.log = tempfile.TemporaryFile()  # noqa: SIM115, closed in _end()
                    self.process = subprocess.Popen(
                        [sys.executable, "-c", "from cspine_submission.child import serve; serve()"],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=env,
                    )
                except OSError as e:  # no process, or no temporary file, is to be had
                    raise Failed(f"{self.doing}: no process can be started ({why(e)})", ours=True) from None
            try:
                self.ready = self._ask((self.factory, self.args), timeout, f"{self.doing}: the process did not start within {timeout:.3g} s")
            except Failed as e:
                self._end()
                e.ours = True
                raise
        return self.ready

    def ask(self, question, timeout):
        """The answer, or Failed with the reason; the process is killed if that takes more than `timeout` s."""
        self.start()
        return self._ask(question, timeout, f"{self.doing} took more than {timeout:.3g} s and was stopped")

    def close(self):
        """End the process, whatever it is doing, for good."""
        with self.lock:
            self.closed = True
            process = self.process
        if process is not None:
            process.kill()
            process.wait()

    def _end(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self.log):
                try:
                    pipe.close()
                except OSError:  # what was still to be written goes nowhere
                    continue
        self.process = self.log = None

    def _ask(self, question, timeout, too_late):
        late, process = threading.Event(), self.process

        def stop():
            late.set()
            process.kill()

        timer = threading.Timer(min(timeout, threading.TIMEOUT_MAX), stop)
        timer.daemon = True
        timer.start()
        try:
            pickle.dump(question, process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            ok, value = pickle.load(process.stdout)
        except Exception as e:  # noqa: BLE001, cut off in the middle a pickle can raise almost anything
            timer.cancel()
            failed = Failed(too_late) if late.is_set() else self._last_words(e)
            self._end()
            raise failed from None
        timer.cancel()
        if late.is_set():  # answered at the last moment: the process is dying, the answer is whole
            self._end()
        if not ok:
            reason, memory, expected = value
            raise Failed(reason, ours=memory, expected=expected)
        return value

    def _last_words(self, error):
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            return Failed(f"{self.doing}: the process sent what cannot be understood ({why(error)})")
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return Failed(f"{self.doing}: the process died ({ended}{'; ' + lines[-1] if lines else ''})", died=code)


def serve():
    """A child process: questions in on stdin, (ok, answer or reason) out on stdout, until stdin closes."""
    for s in (signal.SIGINT, signal.SIGTERM):  # meant for the run, which ends its processes
        signal.signal(s, signal.SIG_IGN)
    answers, asked, questions = os.fdopen(os.dup(1), "wb"), os.fdopen(os.dup(0), "rb"), queue.SimpleQueue()
    os.dup2(2, 1)  # what a library prints must not end up between the answers
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def listen():
        try:
            while True:
                questions.put(pickle.load(asked))
        except Exception:  # noqa: BLE001, the run is gone, or what it said was cut off: nobody waits for an answer
            os._exit(0)

    def answer(*value):
        pickle.dump(value, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    factory, args = pickle.load(asked)
    threading.Thread(target=listen, daemon=True).start()
    try:
        module, function = factory.split(":")
        ready, work = getattr(importlib.import_module(module), function)(*args)
    except BaseException as e:  # noqa: BLE001, the reason is for the report
        answer(False, _told(e))
        return
    answer(True, ready)
    while True:
        try:
            answer(True, work(questions.get()))
        except BrokenPipeError:
            return
        except Exception as e:  # noqa: BLE001, the reason is for the report
            answer(False, _told(e))


def _told(error):
    return why(error), isinstance(error, MemoryError), isinstance(error, CspineError)
