"""What every command shares; knows no task and no optional feature."""

import os

# Before torch is imported, and so before its OpenMP library reads it: a thread that waits for another sleeps instead of
# spinning. With one other busy program on two cores, spinning made training 4 to 6 times slower (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
