"""The first file of the child process, run by its path: the fake device must be loaded before torch is imported.

Torch looks its CUDA hooks up once and keeps them. An import of anything in this package would import torch first.
"""

import ctypes
import json
import sys


def main() -> None:
    """Loads the fake device, then serves."""
    settings = json.loads(sys.argv[1])
    sys.path[:] = settings["path"]
    shim = ctypes.CDLL(settings["shim"], mode=ctypes.RTLD_GLOBAL) if settings["shim"] else None
    from compiled_loss.inspection import child

    child.serve(shim, settings["target"], settings["input"], settings["output"])


if __name__ == "__main__":
    main()
