"Every test, and every process that a test starts, computes in one thread: pytest-xdist has a process per core, and threads beyond that wait for each other."
import os

for name in ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS'):
    os.environ[name] = '1'   # before torch and numpy read it
os.environ['NO_ALBUMENTATIONS_UPDATE'] = '1'   # which otherwise asks the network for a newer version
