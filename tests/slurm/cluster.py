"""A Slurm cluster of four nodes on one machine: munge, slurmctld and slurmd, each node a machine of its own as far as it can tell.

The rules it keeps:

1. A node has its own hostname, processes, IPC, /dev/shm and network address; its cable goes to a switch that all share. To cut its
   power is to take the cable out and to kill the first process of its space, so that nobody hears a last word of it.
2. Everything lies in one folder and in one network of its own, so that it disturbs no Slurm that is there.
3. Whatever was started is ended, by its process id, also when the start failed halfway. Of the network nothing is left then.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

NODES = ("n1", "n2", "n3", "n4")
CPUS = 4
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "sinfo", "squeue", "unshare", "nsenter", "ip")
PACKAGES = "slurmctld slurmd slurm-client munge libpmix-dev iproute2"
"""Debian's. Its Slurm looks for libpmix.so, which is in the -dev package only."""
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
SITE_ADDRESS = "10.85.0.1"
START_LIMIT_S = 60.0
COMMAND_LIMIT_S = 30.0
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")
"""States in which a job stays."""

SITE_SCRIPT = """
ip link set lo up && ip link add switch type bridge && ip addr add {address}/24 dev switch && ip link set switch up && echo up
exec sleep infinity
"""
NODE_SCRIPT = """
hostname "$1" && mount --bind "$2/hosts" /etc/hosts && mount -t tmpfs tmpfs /dev/shm && ip link set lo up || exit
until ip addr add "$3/24" dev eth0; do sleep 0.02; done 2>/dev/null
ip link set eth0 up && slurmd -D -N "$1" & wait $!
"""
"""The first process of a node. It waits instead of becoming slurmd, because it must also be there for orphans."""

CONFIGURATION = """
ClusterName=trial
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge/socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/spool.%n
TmpFS={folder}/tmp.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=1000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout=10
KillWait=5
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


class Done(NamedTuple):
    """What became of a command, or of a job: its exit code and what it printed."""

    code: int
    out: str


def why_not() -> str:
    """Return why there can be no cluster here; nothing if there can."""
    missing = [name for name in PROGRAMS if _find(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install {PACKAGES}"
    if os.geteuid() != 0:
        return "nodes are made of namespaces, for which one must be root"
    trial = "mount -t tmpfs tmpfs /dev/shm && ip link add switch type bridge && ip link add n1 type veth peer name eth0"
    tried = subprocess.run([*UNSHARE, "sh", "-c", trial], capture_output=True, text=True)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _find(program: str) -> str | None:
    return shutil.which(program, path=PATH)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _address(node: str) -> str:
    return f"10.85.0.1{node.removeprefix('n')}"


def _network(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def wait_for(what: str, ready: Callable[[], object], limit_s: float, every_s: float = 0.1) -> None:
    """Wait until `ready` returns something true."""
    end = time.monotonic() + limit_s
    while not ready():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {limit_s:g} s")
        time.sleep(every_s)


class Cluster:
    """The cluster. `with Cluster() as cluster:` starts and ends it.

    Attributes
    ----------
    folder : Path
        Where everything lies; jobs may put their files there too.
    """

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="jd_slurm_", dir="/tmp"))
        self.folder.chmod(0o755)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._jobs: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._configure()
            self._start_site()
            self._start_munge()
            self._start("slurmctld", self._at_site("slurmctld", "-D", "-c"))
            for node in NODES:
                self.power_on(node)
            wait_for("four idle nodes", self.all_idle, START_LIMIT_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            for job in self._jobs:
                self.command("scancel", job)
        for name in [*NODES, "slurmctld", "munged", "site"]:
            self._end(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- commands and jobs -------------------------------------------------------------------------------------------

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a user of this cluster."""
        foreign = ("SLURM_", "PMI", "OMPI_", "COVERAGE_", "JD_HPC_", "MAKE", "MFLAGS")
        env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {**env, "SLURM_CONF": str(self.folder / "slurm.conf"), "OPENBLAS_NUM_THREADS": "1", **settings}

    def command(self, *words: object, limit_s: float = COMMAND_LIMIT_S, cwd: Path | None = None, **settings: str) -> Done:
        """Run a command and return its exit code and what it printed; -1 if it had to be ended."""
        run = subprocess.Popen(
            self._at_site(*map(str, words)), cwd=cwd or self.folder, env=self.environment(**settings),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        try:
            out, code = run.communicate(timeout=limit_s)[0], run.returncode
        except subprocess.TimeoutExpired:
            jobs = self.command("squeue", "-o", "%i %j %T %r %N").out
            run.kill()
            out, code = f"{run.communicate()[0]}\nnot within {limit_s:g} s\n{jobs}", -1
        return Done(code, out)

    def submit(self, *words: object, cwd: Path, **settings: str) -> str:
        """Give a job to sbatch and return its number."""
        done = self.command("sbatch", "--parsable", *words, cwd=cwd, **settings)
        assert done.code == 0, done.out
        self._jobs.append(done.out.split()[-1].split(";")[0])
        return self._jobs[-1]

    def facts(self, job: str) -> dict[str, str]:
        """Return what Slurm knows of a job: JobState, ExitCode, Restarts ..."""
        return dict(re.findall(r"(\w[\w:/]*)=(\S*)", self.command("scontrol", "show", "job", job).out))

    def state(self, job: str) -> str:
        """Return a job's state."""
        return self.facts(job).get("JobState", "unknown")

    def wait_state(self, job: str, *states: str, limit_s: float = 60.0) -> None:
        """Wait until a job is in one of these states."""
        wait_for(f"job {job} {' or '.join(states)}", lambda: self.state(job) in states, limit_s)

    def wait_over(self, job: str, limit_s: float = 60.0) -> int:
        """Wait until a job is over and has left its nodes; return the exit code of its script, or 128 + a signal."""
        self.wait_state(job, *OVER, limit_s=limit_s)
        code, _, number = self.facts(job)["ExitCode"].partition(":")
        return int(code) or (128 + int(number) if int(number) else 0)

    def run_now(self, job: str) -> None:
        """Have a requeued job not wait the two minutes that Slurm makes it wait."""
        self.wait_state(job, "PENDING", limit_s=60.0)

        def started() -> bool:
            self.command("scontrol", "update", f"jobid={job}", "starttime=now")
            return self.state(job) != "PENDING"

        wait_for(f"job {job} runs again", started, 60.0, every_s=0.5)

    # ---- nodes -------------------------------------------------------------------------------------------------------

    def power_on(self, node: str) -> None:
        """Start a node, and connect it to the switch."""
        self._start(node, self._at_site(*UNSHARE, "bash", "-c", NODE_SCRIPT, node, node, str(self.folder), _address(node)))
        pid = self._running[node].pid
        site = _network(self._running["site"].pid)
        wait_for(f"the network of {node}", lambda: _network(pid) not in (site, _network(os.getpid())), START_LIMIT_S, every_s=0.005)
        for words in (f"add {node} type veth peer name eth0 netns {pid}", f"set {node} master switch up"):
            done = self.command("ip", "link", *words.split())
            assert done.code == 0, done.out

    def power_off(self, node: str) -> None:
        """Cut a node's power: nothing that it still says is heard, and all its processes are gone."""
        self.command("ip", "link", "del", node)
        self._end(node)

    def all_idle(self) -> bool:
        """Whether all nodes are there and without a job."""
        return self.command("sinfo", "-h", "-o", "%T %D", "-p", "main").out.strip() == f"idle {len(NODES)}"

    def repair(self) -> None:
        """Bring everything back for the next test: no job, all nodes idle."""
        for job in self._jobs:
            if self.state(job) not in (*OVER, "unknown"):
                self.command("scancel", job)
        for node in NODES:
            if self._running[node].poll() is not None:
                self.power_on(node)

        def idle() -> bool:
            for line in self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").out.splitlines():
                if "down" in line or "drain" in line:
                    self.command("scontrol", "update", f"nodename={line.split()[0]}", "state=resume")
            return self.all_idle()

        wait_for("all nodes idle again", idle, 60.0)

    # ---- processes ---------------------------------------------------------------------------------------------------

    def _configure(self) -> None:
        for name in ("munge", "state", *(f"{kind}.{node}" for kind in ("spool", "tmp") for node in NODES)):
            (self.folder / name).mkdir()
        host = socket.gethostname().partition(".")[0]
        lines = [f"NodeName={node} NodeAddr={_address(node)} CPUs={CPUS} CoresPerSocket={CPUS} RealMemory=2000" for node in NODES]
        text = CONFIGURATION.format(host=host, address=SITE_ADDRESS, folder=self.folder, nodes="\n".join(lines))
        (self.folder / "slurm.conf").write_text(text)
        names = {host: SITE_ADDRESS, **{node: _address(node) for node in NODES}, "localhost": "127.0.0.1"}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))

    def _start_site(self) -> None:
        """The network with the switch in it. It lives as long as this process."""
        self._start("site", ["unshare", "--net", "bash", "-c", SITE_SCRIPT.format(address=SITE_ADDRESS)])
        wait_for("the switch", lambda: "up" in (self.folder / "site.out").read_text(), START_LIMIT_S, every_s=0.01)

    def _at_site(self, *words: str) -> list[str]:
        """Return a command as it runs in the site's network."""
        return ["nsenter", f"--net=/proc/{self._running['site'].pid}/ns/net", *words]

    def _start_munge(self) -> None:
        munge = self.folder / "munge"
        munge.chmod(0o711)
        key = munge / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{name}={munge / file}" for name, file in files.items()]
        self._start("munged", ["munged", "--foreground", "--force", *options])
        wait_for("munge", (munge / "socket").exists, START_LIMIT_S, every_s=0.02)

    def _start(self, name: str, words: list[str]) -> None:
        program = _find(words[0])
        assert program is not None, f"no {words[0]}"
        with (self.folder / f"{name}.out").open("ab") as out:
            self._running[name] = subprocess.Popen(
                [program, *words[1:]], env=self.environment(PATH=PATH), cwd=self.folder,
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip

    def _end(self, name: str) -> None:
        process = self._running.get(name)
        if process is None:
            return
        # KILL to unshare, whose --kill-child then ends the node's whole space
        process.send_signal(signal.SIGKILL if name in NODES else signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
