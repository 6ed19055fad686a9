"""What the GPU's memory holds, in GiB, and how to give back what nothing uses."""

import gc

import torch

GIB = 2**30


def gpu_memory(device: torch.device | int | None = None) -> dict[str, float]:
    """Memory of one CUDA device in GiB; empty on a machine without CUDA.

    Returns:
        allocated: held by tensors now.
        reserved: held by torch's caching allocator, which is what `nvidia-smi` shows plus
            the CUDA context.
        peak: the most that was ever allocated since the start or the last reset.
        free, total: of the device, all processes counted.
    """
    if not torch.cuda.is_available():
        return {}
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    free, total = torch.cuda.mem_get_info(device)
    sizes = {"allocated": allocated, "reserved": reserved, "free": free, "total": total}
    sizes["peak"] = torch.cuda.max_memory_allocated(device)
    return {name: size / GIB for name, size in sizes.items()}


def print_gpu_memory(label: str = "GPU memory", device: torch.device | None = None) -> None:
    """Print one line per CUDA device, or of the given one, or one line saying that there is none.

    To ask a device starts a CUDA context on it: a process of several names its own.
    """
    if not torch.cuda.is_available():
        print(f"{label}: no CUDA device")
        return
    sizes = "{allocated:.2f} GiB · reserved {reserved:.2f} · peak {peak:.2f} · free {free:.2f}"
    for index in range(torch.cuda.device_count()) if device is None else [device.index or 0]:
        line = (sizes + " of {total:.2f}").format(**gpu_memory(index))
        print(f"{label}: cuda:{index} allocated {line}")


def clear_memory() -> None:
    """Collect garbage, then return cached blocks to the driver and reset the peak counter.

    Tensors that a variable still names stay: `del model` first. Inside a training loop this
    only slows: torch reuses its cached blocks by itself.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
