"""One thread per test process (busy cores make OpenMP spin), no network, a folder per test that is the working folder."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
