"""What every command shares; knows no task and no optional feature."""

import os

# Before torch is imported, and so before its OpenMP library reads it: a thread that waits for another sleeps instead of
# spinning. With one other busy program on two cores, spinning made training 4 to 6 times slower (docs/log.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# But for some microseconds it spins: waking it takes longer than most products of one row, of which a new token needs
# dozens. The number is one of libgomp's loop; its own default is 100 times as many.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
