"""Who trains in a run folder: one start at a time. Two at once would remove each other's half-written checkpoints.

Rank 0 leaves RUN_DIR/owner.json, made by link(2), and renews its time now and then; a second start is refused while
the first lives. No locks of the kernel: shared file systems have them or not, and keep them for machines that are gone.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from megadpo.errors import CheckpointError
from megadpo.files import storage_errors
from megadpo.parallel.squeue import job_state

FILE = "owner.json"
BEAT = 20.0
"""Seconds between two signs of life: times that the file gets."""
DEAD = 180.0
"""Seconds without one after which an owner on another machine is dead, where SLURM does not say more."""
DYING = 3.0
"""Seconds that a process on this machine gets to be gone: a killed one may still have to write what it began."""
LARGEST, LONGEST = 1 << 16, 256
"""Bytes of the file, and characters of a word in it, that are looked at."""
NEVER = (errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR)
"""Errors of a read that trying again does not mend."""


@dataclass(frozen=True)
class Owner:
    """What a start says of itself."""

    token: str
    """Of this start alone."""
    host: str
    pid: int
    machine: str
    """Boot and namespace of process ids, within which a process id means something; empty where that is not known."""
    started: int
    """When the process began, in the kernel's ticks: tells it from a later one of the same number."""
    since: str
    """The same for people."""
    job: str | None = None
    """SLURM's number of the job."""
    requeue: int = 0
    """How often SLURM has started the job again."""
    cluster: str | None = None
    run: str | None = None
    """torchrun's id of the job."""
    restart: int = 0
    """How often torchrun has started it again."""

    def __str__(self) -> str:
        job = f" in job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, started {self.since},"


def this_start() -> Owner:
    run = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none" is torchrun's word for no id
    restart, requeue = (os.environ.get(name, "") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=_machine(),
        started=began(os.getpid()) or 0,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        job=os.environ.get("SLURM_JOB_ID"),
        requeue=int(requeue) if requeue.isdecimal() else 0,
        cluster=os.environ.get("SLURM_CLUSTER_NAME"),
        run=None if run == "none" else run,
        restart=int(restart) if restart.isdecimal() else 0,
    )


def read_owner(run_dir: Path) -> Owner | None:
    """None where nobody has the folder. Half a file has an owner, too: nobody knows which.

    Raises CheckpointError where it cannot be read, or is no file.
    """
    path = run_dir / FILE
    end = time.monotonic() + DYING
    while True:
        try:
            data = _read(path)
            break
        except OSError as error:  # a network file system may have it again the next moment
            if time.monotonic() > end or error.errno in NEVER:
                raise CheckpointError(
                    f"{path.absolute()} cannot be read ({error.strerror}), so nobody knows whether a start trains in "
                    "the folder; let this user read it, or delete it if you know that none does"
                ) from None
            time.sleep(0.2)
    if data is None:
        return None
    unknown = Owner(hashlib.sha256(data).hexdigest()[:32], "an unknown machine", 0, "", 0, "at an unknown time")
    return _parsed(data) or unknown


def _read(path: Path) -> bytes | None:
    """None: there is none. Raises OSError where it cannot be read; waits for nobody, reads LARGEST bytes at most."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EISDIR, "no regular file")
        return os.read(descriptor, LARGEST)
    finally:
        os.close(descriptor)


def _parsed(data: bytes) -> Owner | None:
    """None where this is not what a start says of itself."""
    try:
        found = Owner(**json.loads(data))
    except (ValueError, TypeError, RecursionError):
        return None
    words = (found.token, found.host, found.machine, found.since, found.job, found.cluster, found.run)
    numbers = (found.pid, found.started, found.restart, found.requeue)
    if not all(word is None or (type(word) is str and len(word) <= LONGEST and word.isprintable()) for word in words):
        return None
    if not all(type(number) is int and 0 <= number < 1 << 63 for number in numbers):
        return None
    if None in words[:4] or not (found.token.isascii() and found.token.isalnum() and len(found.token) <= LONGEST // 2):
        return None  # the token becomes part of a file's name
    return found


def lives(there: Owner, here: Owner) -> bool | None:
    """Whether another start lives, seen from this one; None: only the age of its file tells."""
    if there.machine and there.machine == here.machine:
        return began(there.pid) == there.started
    if there.job and there.cluster == here.cluster:
        if there.job == here.job and there.requeue != here.requeue:
            return False  # this job was requeued: its start before has ended
        if there.job != here.job and shutil.which("squeue") is not None:
            state, _ = job_state(there.job)
            if state != "UNKNOWN":
                return state is not None
    if there.run and there.run == here.run and there.restart < here.restart:
        return False
    return None


class Ownership:
    """Of a run folder, for the length of a with-block, from `take` on."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._path = run_dir, run_dir / FILE
        self._me = this_start()
        self._held = False
        self._released = threading.Event()

    def __enter__(self) -> Ownership:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        if self._held:
            self._held = False
            with suppress(OSError):
                if self._is_mine():
                    self._path.unlink()

    def take(self, tell: Callable[[str], None]) -> None:
        """Raises CheckpointError where another start has the folder. A dead one's is taken over, and told of."""
        dead: Owner | None = None
        with storage_errors(self._path):
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while not self._held:
                if self._create(self._path):
                    self._held = True
                    break
                there = read_owner(self._run_dir)
                if there is None:
                    continue
                if self._alive(there, tell):
                    raise CheckpointError(self._refusal(there))
                if self._replace(there):
                    self._held, dead = True, there
        if dead is not None:
            tell(f"WARNING    {dead} no longer lives: this start takes {self._run_dir} over")
        threading.Thread(target=self._beat, name="owner", daemon=True).start()

    def _alive(self, there: Owner, tell: Callable[[str], None]) -> bool:
        """Judged at once where that can be; else by the next sign of life."""
        verdict = lives(there, self._me)
        if verdict and there.machine == self._me.machine:
            end = time.monotonic() + DYING
            while lives(there, self._me) and time.monotonic() < end:
                time.sleep(0.1)
            return bool(lives(there, self._me))
        if verdict is not None:
            return verdict
        wait, seen = DEAD, self._sign()
        with suppress(OSError):  # this only shortens the wait: clocks may be set anew, and none of them ends a start
            if seen is not None and self._now() - seen[1] / 1e9 > DEAD:
                wait = 2 * BEAT
        tell(f"{there} may live: waiting for a sign of life of it, {wait:.0f} s at most")
        end = time.monotonic() + wait
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 4))
            with suppress(OSError):
                if (now := self._sign()) != seen:
                    return now is not None
        return False

    def _sign(self) -> tuple[int, int] | None:
        """The file and its time (inode, ns by the clock of the file system): another one with every sign of life; None:
        it is gone."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)  # opening it is what makes NFS ask the server
        except FileNotFoundError:
            return None
        try:
            found = os.fstat(descriptor)
            return found.st_ino, found.st_mtime_ns
        finally:
            os.close(descriptor)

    def _now(self) -> float:
        """By the same clock."""
        probe = self._mine(".now")
        try:
            probe.write_text("")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _mine(self, ending: str) -> Path:
        """A file that no other start writes."""
        return self._path.with_name(f"{FILE}.{self._me.token}{ending}")

    def _create(self, path: Path) -> bool:
        """Make the file with what this start says of itself, unless it is there: as a whole, and only once of all."""
        text, partial = json.dumps(asdict(self._me), indent=1), self._mine(".partial")
        try:
            partial.write_text(text)
            try:
                os.link(partial, path)
            except FileExistsError:
                return partial.stat().st_nlink > 1  # NFS may have done it, and lost the answer
            except OSError:
                return _without_links(path, text)
            return True
        finally:
            partial.unlink(missing_ok=True)

    def _replace(self, dead: Owner) -> bool:
        """Take a dead owner's place. Of those who try, only who makes a file that is named after the dead one may."""
        licence = self._path.with_name(f"{FILE}.{dead.token}.taken")
        end = time.monotonic() + 30
        while not self._create(licence):
            now = read_owner(self._run_dir)
            if now is None or now.token != dead.token:
                return False
            if time.monotonic() > end:
                raise CheckpointError(
                    f"{licence}: another start began to take the folder over, and did not end; delete this file, and "
                    "start again"
                )
            time.sleep(0.2)
        try:
            now = read_owner(self._run_dir)
            if now is None or now.token != dead.token:
                return False
            self._put()
            return True
        finally:
            licence.unlink(missing_ok=True)

    def _put(self) -> None:
        """The file with what this start says of itself, in one step, whatever was there."""
        fresh = self._mine(".partial")
        try:
            fresh.write_text(json.dumps(asdict(self._me), indent=1))
            os.replace(fresh, self._path)
        finally:
            fresh.unlink(missing_ok=True)

    def _refusal(self, there: Owner) -> str:
        end = f"kill -INT {there.pid} on {there.host}"
        if there.job:
            end = f"scancel --signal=INT {there.job}"
        return (
            f"run_dir = {self._run_dir.absolute()}: {there} trains in it already; wait for its end, save and end it "
            f"({end}), or give another run_dir; if you know that it is dead, delete {self._path.absolute()}"
        )

    def _is_mine(self) -> bool:
        there = _parsed(_read(self._path) or b"")
        return there is not None and there.token == self._me.token

    def _beat(self) -> None:
        """Show that this start lives. It ends where another's whole file is seen twice in a row, and nowhere else: a
        file that cannot be read says nothing, one that is gone or broken is written again."""
        seen = ""
        while not self._released.wait(BEAT):
            with suppress(OSError):  # a disk that does not answer now may do so the next time
                data = _read(self._path)
                there = None if data is None else _parsed(data)
                if self._released.is_set():
                    return
                if there is None:
                    seen = ""
                    if data is None:
                        self._create(self._path)
                    else:
                        self._put()
                elif there.token == self._me.token:
                    seen = ""
                    os.utime(self._path)
                elif there.token == seen:
                    self._end(there)
                else:
                    seen = there.token

    def _end(self, there: Owner) -> None:
        """At once, without a save: it would be written among the other's checkpoints."""
        text = (
            f"{there} took {self._run_dir.absolute()} over, while this process ({self._me.pid} on {self._me.host}) "
            "gave no sign of life: this one ends without a save; the other goes on from the newest checkpoint\n"
        )
        for stream in (sys.stderr, sys.__stdout__):  # the log and the terminal
            with suppress(Exception):
                if stream is not None:
                    stream.write(text)
                    stream.flush()
        os._exit(1)


def _without_links(path: Path, text: str) -> bool:
    """Make the file on a file system that has no links, unless it is there."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return True


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def began(pid: int) -> int | None:
    """When the process began; None where there is none, or only what is left of one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None
