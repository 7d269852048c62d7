"""The end of a process of several: it leaves their group while its interpreter is still whole."""

import atexit
import gc
import sys
import threading
import weakref
from typing import Any

import torch.distributed as dist

_PATIENCE = 10.0

_holders: list[weakref.ref[Any]] = []


def leave_at_exit() -> None:
    """Leave the process group when the interpreter ends, and wait for its threads.

    A thread of gloo's that lets go of its last tensor later than that takes the process down (SIGABRT). The threads end
    with the last holder of the group, so what was made here to hold it is emptied. After an error nothing is waited
    for, and else not for long: the other processes may never do their part of what is under way. (Before 2.8, torch
    waits for them with Python's lock held, whatever is done here.)
    """
    asked = threading.Event()
    leaver = threading.Thread(target=_destroy_group, args=(asked,), daemon=True)
    leaver.start()  # an interpreter that ends starts no thread any more
    atexit.register(_leave, asked, leaver)


def empty_at_exit(holder: Any) -> None:
    """Remember an object of this library that holds the group."""
    _holders.append(weakref.ref(holder))


def _leave(asked: threading.Event, leaver: threading.Thread) -> None:
    if dist.is_initialized() and not hasattr(sys, "last_value"):
        asked.set()
        leaver.join(_PATIENCE)


def _destroy_group(asked: threading.Event) -> None:
    asked.wait()
    holders = [holder for holder in (reference() for reference in _holders) if holder is not None]
    meshes = {id(holder) for holder in holders}
    for one in gc.get_objects():
        if type(one).__name__ == "FSDPMeshInfo" and id(vars(one).get("mesh")) in meshes:
            holders.append(one)
    for holder in holders:
        vars(holder).clear()
    dist.destroy_process_group()  # last: it alone waits without Python's lock, from torch 2.8 on
