"""What torchrun tells a process about the others, read without importing torch."""

import os

RANK = int(os.environ.get("RANK", "0"))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # on its machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on its machine
RESTARTS = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))  # of all processes so far
