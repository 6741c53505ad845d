"""Which process holds a lock, and does it live? A pid alone does not say: it is given again, and other hosts
and containers have their own."""
import hashlib
import os
import platform
import subprocess
from pathlib import Path

PATIENCE = 10.0                                 # seconds for the system to answer


def born(pid):
    """When a process of this machine began, in its system's own words: None without such a process, "" where
    the system does not say. A pid alone does not tell: it is given again."""
    if os.name == "nt":
        return born_on_windows(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()       # a zombie has ended
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        pass                                                    # another user's, but there
    try:
        said = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True,
                              timeout=PATIENCE, env=os.environ | {"LC_ALL": "C", "TZ": "UTC"}).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return None if said and said[0].startswith("Z") else " ".join(said[1:])


def born_on_windows(pid):
    """The same by Windows' own calls; there, os.kill(pid, 0) would end the process."""
    import ctypes
    from ctypes import wintypes
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.restype = wintypes.HANDLE
    kernel.OpenProcess.argtypes = wintypes.DWORD, wintypes.BOOL, wintypes.DWORD
    kernel.GetExitCodeProcess.argtypes = wintypes.HANDLE, ctypes.POINTER(wintypes.DWORD)
    kernel.GetProcessTimes.argtypes = wintypes.HANDLE, *[ctypes.POINTER(wintypes.FILETIME)] * 4
    kernel.CloseHandle.argtypes = (wintypes.HANDLE,)
    handle = kernel.OpenProcess(0x1000, False, pid)             # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return "" if ctypes.get_last_error() == 5 else None     # 5: access denied, so it is there
    try:
        status, times = wintypes.DWORD(), [wintypes.FILETIME() for _ in range(4)]
        if kernel.GetExitCodeProcess(handle, ctypes.byref(status)) and status.value != 259:  # STILL_ACTIVE
            return None
        there = kernel.GetProcessTimes(handle, *map(ctypes.byref, times))
        return f"{times[0].dwHighDateTime << 32 | times[0].dwLowDateTime}" if there else ""
    finally:
        kernel.CloseHandle(handle)


def text_of(path):
    """The text of a small file, "" where there is none to read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def machine():
    """What tells this machine, and the table that its pids are in, from others: the hosts of a shared folder,
    containers with tables of their own, the same machine before it was started again."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    known = text_of("/etc/machine-id")
    return {"host": platform.node(), "boot": text_of("/proc/sys/kernel/random/boot_id"), "space": space,
            "machine": hashlib.sha256(known.encode()).hexdigest()[:16] if known else ""}


def fate(said):
    """Of a lock's process: "alive", "gone", or "unknown" where it cannot be checked from here."""
    here = machine()
    if all(said[key] == here[key] for key in ("boot", "space")) and (here["boot"]
                                                                     or said["host"] == here["host"]):
        began = born(said["pid"])
        return "gone" if began is None or (began and said["born"] and began != said["born"]) else "alive"
    same = here["machine"] and all(said[key] == here[key] for key in ("host", "machine"))
    return "gone" if same and said["boot"] != here["boot"] else "unknown"   # the machine was started again
