"""Locks of directories: one command at a time writes to a run or to an encoded data set.

The lock is a file in the directory. It names the process that holds it and carries a counter, the
heartbeat, which that process raises every few seconds. A process that was killed leaves its file
behind. Whether the holder still runs is found out like this:

- On the holder's machine by `flock`, which the kernel releases when a process ends, however it
  ends; where the file system has no `flock`, by the process id and the start time of the process.
- From another machine (a shared file system, gs://) by the heartbeat: it is read for a minute, and
  if it does not change, the holder is dead. Clocks of machines are never compared.

A copy of a directory may contain the file of its original; nobody holds it.
"""

import contextlib
import dataclasses
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from hmar_jax.errors import InputError, printable
from hmar_jax.io.files import absolute, is_local
from hmar_jax.parallel import processes

try:
    import fcntl
except ImportError:  # not Unix: the heartbeat and the process id decide
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock.tmp"  # .tmp: no part of what a directory contains, as after every kill
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0  # without a heartbeat, after which a holder on another machine is dead
_POLL_SECONDS = 1.0
_SETTLE_SECONDS = 1.0  # in which two that take a free lock in an object store see each other

_log = logging.getLogger(__name__)


class MovedDirectoryError(InputError):
    """A directory was moved or deleted while a command wrote to it.

    Attributes:
      place: where it is now, or None: it was deleted, or the system does not tell.
    """

    def __init__(self, message: str, place: epath.Path | None):
        super().__init__(message)
        self.place = place


@dataclasses.dataclass(frozen=True)
class Holder:
    """A process, as a lock file describes it."""

    host: str
    machine: str  # changes with each boot; "" where the system does not tell
    pids: str  # the namespace that the process id belongs to, such as a container's
    pid: int
    process_start: str  # clock ticks since boot: tells processes of the same id apart
    since: str  # for people, UTC
    token: str  # of this lock

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}, since {self.since} UTC"

    def is_on_this_machine(self, here: "Holder") -> bool:
        if self.machine or here.machine:
            return self.machine == here.machine
        return self.host == here.host

    def is_running(self, here: "Holder") -> bool | None:
        """Whether the process runs; None if it is unknown on this machine."""
        if not self.is_on_this_machine(here) or self.pids != here.pids:
            return None
        start = _process_start(self.pid)
        return start is not None and start == self.process_start


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname(),
        machine=_read_first("/proc/sys/kernel/random/boot_id"),
        pids=_pid_namespace(),
        pid=os.getpid(),
        process_start=_process_start(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        token=secrets.token_hex(8),
    )


def _read_first(path: str) -> str:
    try:
        with open(path) as file:
            return file.readline().strip()
    except OSError:
        return ""


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """Identifies the start of a process; None if there is none, "" if the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()  # the name before may have spaces
        return None if fields[0] == "Z" else fields[19]
    except FileNotFoundError:
        if os.path.exists("/proc/self/stat"):
            return None
    except (OSError, IndexError):
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return ""


class DirectoryLock:
    """Holds a directory for this process, from `acquire` to `release`."""

    def __init__(self, directory: os.PathLike | str, what: str, file: str = LOCK_FILE):
        """Does nothing yet.

        Args:
          directory: local or gs://; made if it does not exist.
          what: names it in errors, such as "workdir".
          file: of the lock; commands that share a directory have one each.
        """
        self.directory, self._name, self._what = absolute(directory), os.fspath(directory), what
        self._path = self.directory / file
        self._here = _this_process()
        self._store: _LocalFile | _StoredFile = (
            _LocalFile(self._path) if is_local(self.directory) else _StoredFile(self._path)
        )
        self._made: list[epath.Path] = []
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._taken_by: Holder | None = None
        self._is_gone = False

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
          InputError: another process holds it, or the directory cannot be written. Nothing in the
            directory has changed then.
        """
        try:
            self._name.encode()
        except UnicodeEncodeError:
            raise InputError(
                f"the name of {self._what} must be UTF-8 text, which the libraries that write "
                f"there need; got {printable(self._name)}"
            ) from None
        try:
            self._make_directory()
            self._acquire()
        except BaseException as error:
            self._store.close()
            self._remove_made()
            if isinstance(error, OSError):
                reason = error.strerror or error
                raise InputError(f"cannot write {self._what} {self._name}: {reason}") from None
            raise
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def _acquire(self) -> None:
        while True:
            state = self._store.open()
            if state == "retry":
                continue
            found = _parse(self._store.read())
            if state == "held":
                raise self._in_use(found[0] if found else None)
            if found is not None and self._is_alive(found[0], kernel_says_free=state == "locked"):
                raise self._in_use(found[0])
            self._store.write(_format(self._here, 0))
            if self._store.is_exclusive:
                return
            time.sleep(_SETTLE_SECONDS)
            now = _parse(self._store.read())
            if now is None or now[0].token != self._here.token:
                raise self._in_use(now[0] if now else None)
            return

    def _is_alive(self, holder: Holder, kernel_says_free: bool) -> bool:
        if holder.is_on_this_machine(self._here) and kernel_says_free:
            return False
        running = holder.is_running(self._here)
        if running is not None:
            return running
        _log.info(
            "%s was in use by %s; waiting up to %.0f s for a sign of life",
            self._name,
            holder,
            STALE_SECONDS,
        )
        before, end = self._store.read(), time.monotonic() + STALE_SECONDS
        while time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
            now = self._store.read()
            if now != before:
                return bool(now)  # empty: released
        return False

    def _in_use(self, holder: Holder | None) -> InputError:
        by = f"by {holder}" if holder else "by another process"
        return InputError(
            f"{self._what} {self._name} is in use {by}; wait for it or stop it, or, if there is no "
            f"such process, delete {self._path}"
        )

    def check(self, look: bool = False) -> None:
        """Raises if this process must not write to the directory any more.

        Args:
          look: at the directory now; otherwise, as of the last heartbeat.

        Raises:
          MovedDirectoryError: it was moved or deleted. A library would make another one.
          InputError: another process took the lock while this one seemed dead.
        """
        self._is_gone = self._is_gone or (look and self._store.is_gone())
        if self._is_gone:
            place = self._store.find()
            now = f"moved to {place}" if place else "moved or deleted"
            raise MovedDirectoryError(
                f"{self._what} {self._name} was {now} while this process wrote to it", place
            )
        if self._taken_by is not None:
            raise InputError(
                f"{self._what} {self._name} was taken over by {self._taken_by}, because this "
                f"process gave no sign of life for {STALE_SECONDS:.0f} s; nothing more is written"
            )

    def release(self) -> None:
        """Removes the lock file, and the directory if `acquire` made it and it is empty."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with contextlib.suppress(OSError):
            found = _parse(self._store.read())
            if found is not None and found[0].token == self._here.token:
                self._store.remove()
        self._store.close()
        self._remove_made()

    def __enter__(self) -> "DirectoryLock":
        self.acquire()
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(HEARTBEAT_SECONDS):
            count += 1
            if self._store.is_gone():
                self._is_gone = True
                return
            try:
                found = _parse(self._store.read())
                if found is not None and found[0].token != self._here.token:
                    self._taken_by = found[0]
                    return
                self._store.write(_format(self._here, count))
            except OSError as error:  # the next one may succeed
                _log.debug("heartbeat of %s: %s", self._path, error)

    def _make_directory(self) -> None:
        if not is_local(self.directory):
            return  # object stores have no directories
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self._what} must be a directory; {self._name} is a file")
        missing, path = [], self.directory
        while not path.exists():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(path)
                self._made.insert(0, path)

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # not empty: something was written, or by another
            for path in self._made:
                os.rmdir(path)
        self._made = []


class _LocalFile:
    """A lock file in a file system."""

    def __init__(self, path: epath.Path):
        self._path, self._file = os.fspath(path), -1
        self.is_exclusive = False

    def open(self) -> str:
        """Returns "locked" or "held" as the kernel says, "unknown" without flock, or "retry"."""
        self.close()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if fcntl is None:
                raise OSError("no flock")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError:
            return "unknown"
        try:
            same = os.path.samestat(os.fstat(self._file), os.stat(self._path))
        except FileNotFoundError:
            same = False
        self.is_exclusive = same
        return "locked" if same else "retry"  # the holder has removed the file meanwhile

    def read(self) -> str:
        # By its path: NFS then asks the server.
        try:
            with open(self._path, encoding="utf-8", errors="replace") as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def write(self, text: str) -> None:
        os.pwrite(self._file, text.encode(), 0)  # of constant length
        os.ftruncate(self._file, len(text.encode()))
        os.fsync(self._file)

    def remove(self) -> None:
        os.unlink(self._path)

    def is_gone(self) -> bool:
        """Whether the file's folder does not exist; False where it only cannot be reached now."""
        if self._file < 0:  # held by another process of this run
            return False
        try:
            os.stat(os.path.dirname(self._path))
        except FileNotFoundError:
            return True
        except OSError:
            pass
        return False

    def find(self) -> epath.Path | None:
        """Where a folder that is gone has been moved to; None if the system does not tell."""
        try:
            path = os.readlink(f"/proc/self/fd/{self._file}")
            same = os.path.samestat(os.fstat(self._file), os.stat(path))
        except OSError:
            return None
        return epath.Path(path).parent if same else None

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class _StoredFile:
    """A lock file in an object store."""

    is_exclusive = False

    def __init__(self, path: epath.Path):
        self._path = path

    def open(self) -> str:
        return "unknown"

    def read(self) -> str:
        try:
            return self._path.read_text()
        except FileNotFoundError:
            return ""

    def write(self, text: str) -> None:
        self._path.write_text(text)

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)

    def is_gone(self) -> bool:
        return False  # object stores have no directories

    def find(self) -> epath.Path | None:
        return None

    def close(self) -> None:
        pass


def _format(holder: Holder, beat: int) -> str:
    return json.dumps(dataclasses.asdict(holder) | {"beat": f"{beat:010d}"}, indent=1) + "\n"


def _parse(text: str) -> tuple[Holder, str] | None:
    """The holder and its heartbeat; None for an empty or a half-written file."""
    try:
        found: dict[str, Any] = json.loads(text)
        beat = found.pop("beat")
        return Holder(**found), beat
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


@contextlib.contextmanager
def lock_together(
    directory: os.PathLike | str, what: str, file: str = LOCK_FILE
) -> Iterator[DirectoryLock]:
    """Locks a directory for all processes of a command; the first process holds the lock.

    Raises:
      InputError: on every process, if the directory is in use or cannot be written.
    """
    lock, error = DirectoryLock(directory, what, file), None
    if processes.is_primary():
        try:
            lock.acquire()
        except InputError as e:
            error = e
    processes.raise_on_all_processes(error)
    try:
        yield lock
    finally:
        if processes.is_primary():
            lock.release()
