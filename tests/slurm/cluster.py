"""A real Slurm of two nodes on this machine, for tests; `python tests/slurm/cluster.py bash`: a shell in it.

It needs root and Debian's packages (PACKAGES, installed by .ci/run); no systemd, no cgroups. One runs at a
time, by a lock. All daemons are children of this process and end with it; what they write is in one folder
that is removed. Where there is no MariaDB, sacct does not work, all else does.

Jobs in partition `high` preempt those in `main`, which get their --signal and GRACE_S until they are
requeued.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
ACCOUNTING = ("slurmdbd", "mariadb-server-core", "mariadb-client")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "setpriv")
NODES = ("n1", "n2")
LOCK = Path(tempfile.gettempdir()) / "driftmap-slurm.lock"
GRACE_S = 15
KILL_WAIT_S = 20  # from SIGTERM to SIGKILL, of a job that is requeued by hand or cancelled
NODE_LOST_S = 12  # after which the controller gives a silent node up
REQUEUE_S = 5  # a requeued job waits so long, and a second more; of less Slurm makes two minutes
UP_S = 60


def why_not() -> str | None:
    """Return why no Slurm can run here, None where it can."""
    missing = [name for name in COMMANDS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install {' '.join(PACKAGES + ACCOUNTING)}"
    return None if os.geteuid() == 0 else "daemons of Slurm need root"


class Cluster:
    """Daemons of a cluster by their names, and the folder of what they write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.accounting = all(shutil.which(name) for name in ("slurmdbd", "mariadbd", "mariadb-install-db"))
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Start all daemons and wait until both nodes are idle."""
        for place in ("state", "log", *(f"spool-{node}" for node in NODES)):
            (self.folder / place).mkdir()
        self._configure()
        self._munge()
        if self.accounting:
            self._account()
        self._daemon("slurmctld", "slurmctld", "-D", "-i")
        for node in NODES:
            self.start_node(node)
        self._until(self.idle, "both nodes idle")

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node, for the first time or after it was killed."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the slurmd of a node and all that it has started, as when its power fails."""
        tasks = _processes(SLURMD_NODENAME=node)
        steps = {parent for parent in map(_parent_of, tasks) if _name_of(parent).startswith("slurmstepd")}
        for pid in (self.daemons[node].pid, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons[node].wait()

    def kill_task(self, job: str, rank: int) -> None:
        """Kill one process of a job, as when its memory is at an end."""
        found = _processes(SLURM_JOB_ID=job, SLURM_PROCID=str(rank), SUBMITIT_EXECUTOR="slurm")
        (task,) = (pid for pid in found if _name_of(_parent_of(pid)).startswith("slurmstepd"))
        os.kill(task, signal.SIGKILL)

    def idle(self) -> bool:
        """Return whether all nodes wait for jobs."""
        return self.told("sinfo", "-h", "-N", "-p", "main", "-o", "%t").split() == ["idle"] * len(NODES)

    def told(self, *words: str) -> str:
        """Return what a command of Slurm says, nothing where it fails."""
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=self._names())
        return done.stdout.strip() if done.returncode == 0 else ""

    def clear(self) -> None:
        """Cancel all jobs, start what was killed, and wait until both nodes are idle."""
        for node in NODES:
            if self.daemons[node].poll() is not None:
                self.start_node(node)
        self.told("scancel", "--user=root")
        self._until(lambda: not self.told("squeue", "-h") and self.idle(), "both nodes idle")

    def stop(self) -> None:
        """Cancel all jobs and end the daemons."""
        with contextlib.suppress(AssertionError):
            self.told("scancel", "--user=root")
            self._until(lambda: not self.told("squeue", "-h"), "no jobs", limit_s=10)
        for daemon in reversed(self.daemons.values()):  # slurmctld without slurmdbd is slow to end
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def logs(self) -> str:
        """Return the ends of the logs of all daemons."""
        files = sorted((self.folder / "log").iterdir())
        return "\n".join(f"{file.name}:\n{file.read_text(errors='replace')[-2000:]}" for file in files)

    def _names(self) -> dict[str, str]:
        return {**os.environ, **self.environment}

    def _daemon(self, name: str, *words: str) -> None:
        """Start a daemon in the foreground, which ends when this process does."""
        log = (self.folder / "log" / f"{name}.log").open("ab")
        command = ["setpriv", "--pdeathsig", "TERM", *words]
        self.daemons[name] = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=self._names(),
            start_new_session=True,
        )

    def _until(self, condition: Callable[[], object], what: str, *, limit_s: float = UP_S) -> None:
        end = time.monotonic() + limit_s
        while not condition():
            ended = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                raise AssertionError(f"not within {limit_s} s: {what}; ended: {ended}\n{self.logs()}")
            time.sleep(0.05)

    def _munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key": key, "seed": "munge.seed", "pid": "munge.pid", "log": "munge.log"}
        options = [f"--{name}-file={self.folder / file}" for name, file in files.items()]
        socket_file = self.folder / "munge.socket"
        self._daemon("munged", "munged", "-F", "-f", f"--socket={socket_file}", *options)
        self._until(socket_file.exists, "munged")

    def _account(self) -> None:
        """Start MariaDB and slurmdbd."""
        data, socket_file = self.folder / "mysql", self.folder / "mysql.socket"
        small = "--innodb-log-file-size=4M"
        made = ["--no-defaults", f"--datadir={data}", "--user=root", small]
        install = ["mariadb-install-db", *made, "--auth-root-authentication-method=normal", "--skip-test-db"]
        with (self.folder / "log" / "install.log").open("wb") as log:
            subprocess.run(install, check=True, stdout=log, stderr=log)
        self.environment["MYSQL_UNIX_PORT"] = str(socket_file)
        quiet = ["--skip-networking", "--skip-grant-tables", "--innodb-lock-wait-timeout=900"]
        self._daemon("mariadbd", "mariadbd", *made, f"--socket={socket_file}", *quiet)
        self._until(socket_file.exists, "MariaDB")
        self._daemon("slurmdbd", "slurmdbd", "-D")
        self._until(lambda: self._ok("sacctmgr", "-n", "list", "cluster"), "slurmdbd")
        assert self._ok("sacctmgr", "-i", "add", "cluster", "local")

    def _ok(self, *words: str) -> bool:
        return subprocess.run(words, capture_output=True, check=False, env=self._names()).returncode == 0

    def _configure(self) -> None:
        host = socket.gethostname()
        address = socket.gethostbyname(host)
        auth = f"AuthInfo=socket={self.folder}/munge.socket"
        told = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
        version = int(told.split()[1].split(".")[0])
        # Named, or slurmd looks for a mount of cgroups.
        plugin = "cgroup/v1" if version < 23 else "disabled"
        (self.folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        account = f"AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost={address}\n"
        account += f"AccountingStoragePass={self.folder}/munge.socket\n"
        # Ids of jobs never come again: submitit would take results of another cluster for theirs.
        (self.folder / "slurm.conf").write_text(
            f"ClusterName=local\nSlurmctldHost={host}({address})\nSlurmUser=root\n"
            f"{auth},cred_expire={REQUEUE_S}\nCommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
            "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nSelectType=select/cons_tres\n"
            "SelectTypeParameters=CR_Core\nSchedulerParameters=sched_interval=1,bf_interval=1\n"
            f"KillWait={KILL_WAIT_S}\nSlurmdTimeout={NODE_LOST_S}\n"
            "EnforcePartLimits=ALL\nReturnToService=2\n"
            f"FirstJobId={int(time.time()) % 60_000_000 + 1000}\nStateSaveLocation={self.folder}/state\n"
            f"SlurmdSpoolDir={self.folder}/spool-%n\nSlurmctldPidFile={self.folder}/slurmctld.pid\n"
            f"SlurmdPidFile={self.folder}/%n.pid\nSlurmdParameters=config_overrides\n"
            "PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n"
            f"SlurmctldParameters=preempt_send_user_signal\n{account if self.accounting else ''}"
            f"NodeName=n[1-2] NodeHostname={host} NodeAddr={address} Port=[17001-17002] "
            "CPUs=4 RealMemory=16000\n"
            f"PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime={GRACE_S}\n"
            "PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF\n"
        )
        database = self.folder / "slurmdbd.conf"
        database.write_text(
            f"{auth}\nDbdHost={host}\nDbdAddr={address}\nSlurmUser=root\nStorageHost=localhost\n"
            "CommunicationParameters=NoInAddrAny\nStorageType=accounting_storage/mysql\nStorageUser=root\n"
            f"StorageLoc=slurm_acct_db\nPidFile={self.folder}/slurmdbd.pid\n"
        )
        database.chmod(0o600)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Yield a running cluster, alone on this machine; its variables are in this process's environment."""
    memory = Path("/dev/shm")  # the first files of MariaDB take a minute on a busy disk
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder, _named_nodes():
            Path(folder).chmod(0o755)
            made = Cluster(Path(folder))
            try:
                made.start()
                os.environ.update(made.environment)
                yield made
            finally:
                made.stop()
                for name in made.environment:
                    os.environ.pop(name, None)


@contextlib.contextmanager
def _named_nodes() -> Iterator[None]:
    """Let the names of the nodes be those of this machine, as MASTER_ADDR is one of them."""
    hosts, mark = Path("/etc/hosts"), "# driftmap tests"
    address = socket.gethostbyname(socket.gethostname())
    before = "".join(line for line in hosts.read_text().splitlines(True) if mark not in line)
    hosts.write_text(f"{before.rstrip()}\n{address} {' '.join(NODES)} {mark}\n")  # a mount: no renaming
    try:
        yield
    finally:
        hosts.write_text(before)


def _processes(**environment: str) -> list[int]:
    """Return the processes whose environment has these values."""
    marks, found = {f"{name}={value}".encode() for name, value in environment.items()}, []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if marks <= set((place / "environ").read_bytes().split(b"\0")):
                found.append(int(place.name))
    return found


def _parent_of(pid: int) -> int:
    """Return the parent of a process, 0 where it has ended."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0


def _name_of(pid: int) -> str:
    """Return the name of a process, empty where it has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with cluster():
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], check=False).returncode)
