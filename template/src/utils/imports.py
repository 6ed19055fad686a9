"""Make a start quicker, which is nearly all imports, without changing what is imported."""

import atexit
import gc
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Generator[None]:
    """Import torch, transformers and peft inside it: without collecting garbage meanwhile."""
    # Imports make millions of objects that stay. The collector walks them all again and again.
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # nor need it ever look at them again, while training
        atexit.register(gc.unfreeze)  # else libraries in C++ report leaks at the end
