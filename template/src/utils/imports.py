"""Make a start quicker, which is nearly all imports, without changing what is imported."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Generator
from contextlib import contextmanager, suppress
from unittest.mock import patch


@contextmanager
def quick_imports() -> Generator[None]:
    """Import torch, transformers and peft inside it: 10 instead of 15 s, where it was measured."""
    # Imports make millions of objects that stay. The collector walks them all again and again.
    gc.disable()
    try:
        _import_bitsandbytes()
        with _without_scipy():
            yield
    finally:
        gc.enable()
        gc.freeze()  # nor need it ever look at them again, while training
        atexit.register(gc.unfreeze)  # else libraries in C++ report leaks at the end


def _import_bitsandbytes() -> None:
    """Before peft does, which imports it wherever it is installed, and without torch's compiler.

    It compiles four fallbacks of its CUDA kernels when imported, and for that loads all of
    torch's compiler, 2.6 of its 2.7 s. Uncompiled, as they are here, they do the same.
    """
    import torch

    # Where it does not work, that is for whoever needs it to say: peft does without.
    with suppress(ImportError), patch.object(torch, "compile", lambda function, **_: function):
        import bitsandbytes  # noqa: F401


@contextmanager
def _without_scipy() -> Generator[None]:
    """Keep transformers from importing scipy.optimize, of which only its detection losses know.

    scipy is there because mlflow needs it. transformers imports all its losses with any model.
    """
    import transformers.utils

    # create: a later transformers may name it otherwise, and is then only slower to start.
    with patch.object(transformers.utils, "is_scipy_available", lambda: False, create=True):
        yield
