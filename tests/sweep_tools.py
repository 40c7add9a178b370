"""What tests of whole studies are made of: the command, fresh or forked, and a real PostgreSQL."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from forks import command
from parallel import free_port

from safe_lab import yaml_core


class Sweep:
    """A study file, and the command that works on it."""

    def __init__(self, folder, base):
        self.path = folder / "study.yaml"
        self.folder = folder / "runs" / "study"
        self.log = folder / "sweep.log"
        self.tree = {
            "name": "study",
            "base": base,
            "space": {"training.learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
            "objectives": {"validation/accuracy": "maximize"},
            "sampler": "random",
            "num_trials": 3,
            "heartbeat": 0.5,
        }

    def write(self, **changes):
        """Write the study file with some keys changed."""
        self.tree = self.tree | changes
        self.path.write_text(yaml_core.write(self.tree))

    def start(self, *arguments):
        """The command, running in a fresh process."""
        words = [sys.executable, "-m", "safe_lab", "sweep", str(self.path), *map(str, arguments)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"NO_COLOR": "1"}
            )

    def run(self, *arguments):
        """What the command prints with --json, when it has ended well; all its processes are forks of this one."""
        return json.loads(self._fork("--json", *arguments, code=0))

    def finish(self, process):
        """What a command that runs prints, when it has ended well."""
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, self.log.read_text()
        return json.loads(printed)

    def refuse(self, *arguments):
        """What the command says when it refuses."""
        self._fork(*arguments, code=2)
        return self.log.read_text()

    def _fork(self, *arguments, code):
        printed = self.path.with_suffix(".printed")
        printed.write_text("")
        with command(["sweep", self.path, *arguments], printed, self.log, {"NO_COLOR": "1"}) as fork:
            fork.wait(timeout=300)
        assert fork.returncode == code, self.log.read_text()
        return printed.read_text()

    def rows(self, trial, file="metrics.jsonl", seed=0):
        """Rows of a run's file."""
        path = self.folder / f"trial-{trial:04d}" / f"seed-{seed}" / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class PostgreSQL:
    """A server of the distribution's package, in a temporary folder, on a loopback port."""

    def __init__(self, programs):
        self._programs = programs
        # Not below pytest's folder, which another user cannot enter; and the server does not run as root.
        self._folder = Path(tempfile.mkdtemp(prefix="safe-lab-postgresql-"))
        self._user = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, **self._user)
        self._port = free_port()
        self._call("initdb", "--auth=trust", "--username=tester", "--no-sync", "-D", self._folder / "data")

    @property
    def address(self):
        """For --storage."""
        return f"postgresql://tester@127.0.0.1:{self._port}/postgres"

    def start(self):
        """Start it, and wait until it answers."""
        options = f"-h 127.0.0.1 -p {self._port} -k {self._folder} -c fsync=off"
        self._call("pg_ctl", "-D", self._folder / "data", "-l", self._folder / "log", "-w", "-o", options, "start")

    def stop(self):
        """Stop it at once, as a machine that fails does."""
        self._call("pg_ctl", "-D", self._folder / "data", "-m", "immediate", "stop")

    def remove(self):
        """Stop it for good."""
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _call(self, program, *arguments):
        with tempfile.TemporaryFile("w+") as log:
            # A file, not a pipe: the server that pg_ctl starts would hold it open.
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdout=log,
                stderr=log,
                cwd=self._folder,
                check=False,
                **self._user,
            )
            log.seek(0)
            assert done.returncode == 0, log.read()


def find_postgresql():
    """The folder of PostgreSQL's programs, or None."""
    found = shutil.which("initdb")
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    path = Path(found) if found else packaged[-1] if packaged else None
    return path and path.resolve().parent


def wait_for(condition, seconds=120):
    """What a condition comes to, once it comes to something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def processes_of(process, module):
    """Processes below one that run a module."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if module in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def trainings_of(process):
    """What nurseries below a process have forked."""
    nurseries = processes_of(process, "safe_lab.cli.nursery")
    return [forked for forked in nurseries if forked.ppid() in {nursery.pid for nursery in nurseries}]
