"""`python -m tests.ptx`: compiled Triton kernels on the CPU, checked. From the root of a checkout."""

import os
import sys
from pathlib import Path

# The checkout's root, which `python -m` puts there, would offer its folder kernels/ to every `import kernels` of
# transformers and bitsandbytes. `tests` has been found already, and soundwave is installed.
ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]

# Before torch is imported. The tensors are small; and with --jobs processes are forked, which would wait forever for
# threads that they do not have.
os.environ["OMP_NUM_THREADS"] = "1"

if __name__ == "__main__":
    from tests.ptx.command import main

    sys.exit(main())
