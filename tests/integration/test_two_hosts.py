"""Two machines made of namespaces lose power during a run, one after the other; its resume is bitwise exact.

Each host has its own network, process ids, mounts, host name and sshd; they share the file system, as a cluster's nodes
share theirs. Needs root, and iproute2, openssh-server, openssh-client, pdsh, util-linux (see docs/clusters.md).
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kdtrain.models.tiny import tiny_config
from tests.support.tiny_run import write_run

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("ip", "unshare", "nsenter", "mount", "ssh", "ssh-keygen", "pdsh", "deepspeed")
STEPS = 32
WIRE = "eth0"
LOST_S = 15
"""A rank that waits this long for the others ends itself; ssh connections to a host that is gone, a little before."""
SSHD = """
set -e
ip link set lo up
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd
hostname {name}
exec {sshd} -D -e -f {folder}/sshd_config -o ListenAddress={address}
"""
SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
PidFile none
"""


def path_with_sbin():
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin", "/sbin"])


def what_is_missing():
    """Why hosts cannot be made here, None if they can."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    missing = [name for name in (*PROGRAMS, "sshd") if shutil.which(name, path=path_with_sbin()) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (docs/clusters.md names the packages)"
    probe = f"kdt{os.getpid()}"
    made = subprocess.run([_ip(), "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run([_ip(), "netns", "delete", probe], check=True)
    return None


def _ip():
    return shutil.which("ip", path=path_with_sbin())


class Host:
    """A machine named `name` with one network interface, WIRE, and an sshd; it runs until `lose_power`."""

    def __init__(self, name, address, folder):
        self.name, self.address, self.folder = name, address, folder
        self.netns = f"{name}{os.getpid()}"
        self.process = None
        run(_ip(), "netns", "add", self.netns)

    def plug_in(self, wire):
        run(_ip(), "link", "set", wire, "netns", self.netns, "name", WIRE)
        run(_ip(), "-n", self.netns, "address", "add", f"{self.address}/24", "dev", WIRE)
        self.power_on()

    def power_on(self):
        run(_ip(), "-n", self.netns, "link", "set", WIRE, "up")
        sshd = shutil.which("sshd", path=path_with_sbin())
        script = SSHD.format(name=self.name, sshd=sshd, folder=self.folder, address=self.address)
        with (self.folder / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    _ip(),
                    "netns",
                    "exec",
                    self.netns,
                    "unshare",
                    "--pid",
                    "--fork",
                    "--kill-child",
                    "--mount",
                    "--uts",
                    "--mount-proc",
                    "sh",
                    "-c",
                    script,
                ],
                stdout=log,
                stderr=log,
            )

    def inside(self, *command):
        """The command line that runs `command` on this host."""
        (first,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [
            "nsenter",
            "--target",
            first,
            "--net",
            "--pid",
            "--mount",
            "--uts",
            "--wd=" + str(self.folder),
            *command,
        ]

    def lose_power(self):
        """Every process ends at once and no connection is closed."""
        run(_ip(), "-n", self.netns, "link", "set", WIRE, "down")
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def remove(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        run(_ip(), "netns", "delete", self.netns)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"
    return done.stdout


@contextmanager
def two_hosts(folder):
    """Hosts "alpha" and "beta" that reach each other by ssh with a key made here."""
    for name in ("key", "host_key"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder))
    third = os.getpid() % 250
    with ExitStack() as stack:
        wires = [f"kdt{end}{os.getpid()}" for end in "ab"]
        hosts = []
        for number, name in enumerate(("alpha", "beta"), start=1):
            hosts.append(Host(name, f"10.77.{third}.{number}", folder))
            stack.callback(hosts[-1].remove)
        run(_ip(), "link", "add", wires[0], "type", "veth", "peer", "name", wires[1])
        for host, wire in zip(hosts, wires, strict=True):
            host.plug_in(wire)
        (folder / "hostfile").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
        yield hosts


def ssh_options(folder):
    return (
        f"-i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile={folder}/known_hosts "
        "-o ServerAliveInterval=3 -o ServerAliveCountMax=3"
    )


def wait_for_ssh(hosts, folder):
    deadline = time.monotonic() + 20
    for host in hosts:
        command = ["ssh", *ssh_options(folder).split(), "-o", "ConnectTimeout=2", host.address, "hostname"]
        while True:
            done = subprocess.run(hosts[0].inside(*command), capture_output=True, text=True, check=False, timeout=30)
            if done.stdout.strip() == host.name:
                break
            assert time.monotonic() < deadline, done.stderr + (folder / f"{host.name}.log").read_text()
            time.sleep(0.1)


def driven(block, **names):
    """The command of docs/clusters.md called `block`, its words replaced."""
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    (command,) = re.findall(rf"<!-- driven: {block} -->\n```sh\n(.*)\n```", page)
    for old, new in names.items():
        assert old in command
        command = command.replace(old, str(new))
    return command.split()


def start(hosts, folder, name, *, node=None, alone=False):
    """One of the page's commands on a host: for all with ssh from the first, or for number `node` without; its process.

    alone: both ranks on that node. Output goes to NAME.log.
    """
    (folder / ".deepspeed_env").write_text(
        f"OMP_NUM_THREADS=1\nHF_HUB_OFFLINE=1\nDS_ACCELERATOR=cpu\nPATH={path_with_sbin()}\nGLOO_SOCKET_IFNAME={WIRE}\n"
    )
    environment = {
        **os.environ,
        "PATH": path_with_sbin(),
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": WIRE,
        "PDSH_SSH_ARGS_APPEND": ssh_options(folder),
    }
    names = {
        " hostfile": f" {folder}/hostfile",
        "node-a": hosts[0].address,
        "=NAME": f"={name}",
        "launch/train.py": ROOT / "launch/train.py",
        "CONFIG.yaml": folder / "config.yaml",
    }
    if alone:
        command, host = ["deepspeed", "--num_accelerators=2", *driven("hostfile", **names)[-3:]], hosts[node]
    elif node is None:
        command, host = [*driven("hostfile", **names), "checkpoint.async_write=true"], hosts[0]
        command.insert(1, "--no_ssh_check")  # it would look for the key in the home directory
    else:
        command, host = driven("no_ssh", **names, NODE=node), hosts[node]
    with (folder / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            host.inside(*command), env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )


def outcome(run_folder):
    """Every reported loss and norm, and a hash of all weights."""
    from kdtrain.engine.checkpoint import find_latest, read_full_parameters, step_of
    from kdtrain.telemetry.jsonl_sink import read_records

    kept = ("data/step", "loss/total", "loss/kd", "loss/ce", "optim/grad_norm", "optim/lr")
    latest, digest = find_latest(run_folder / "checkpoints"), hashlib.sha256()
    for name, weight in read_full_parameters(latest):
        digest.update(name.encode() + weight.numpy().tobytes())
    records = [[record[key] for key in kept] for record in read_records(run_folder / "metrics.jsonl")]
    return step_of(latest), digest.hexdigest(), records


def wait_for_step(step, folder, name, process):
    """Until a checkpoint of that step, or a later one, is complete."""
    while max((int(path.name[5:]) for path in (folder / f"runs/{name}/checkpoints").glob("step_*")), default=0) < step:
        assert process.poll() is None, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.01)


def end_of(process, folder, name, timeout_s):
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"{name} did not end within {timeout_s} s:\n{(folder / f'{name}.log').read_text()[-3000:]}")


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_run_resumes_bitwise_after_either_host_loses_power(tmp_path):
    if reason := what_is_missing():
        pytest.skip(reason)
    write_run(
        tmp_path,
        student=tiny_config("smollm"),
        teacher=tiny_config("qwen3"),
        num_documents=600,
        steps=STEPS,
        run={"lock_lease_s": 4},
        guard={"stall_warn_s": 5, "stall_exit_s": LOST_S},
    )
    with two_hosts(tmp_path) as hosts:
        wait_for_ssh(hosts, tmp_path)
        whole = start(hosts, tmp_path, "whole")
        log = tmp_path / "whole.log"
        assert end_of(whole, tmp_path, "whole", 120) == 0, log.read_text()[-3000:]
        assert "mesh     2 ranks" in log.read_text()
        hosts_seen = {json.loads(path.read_text())["host"] for path in (tmp_path / "runs/whole/heartbeat").iterdir()}
        assert hosts_seen == {"alpha", "beta"}

        lost = start(hosts, tmp_path, "lost")
        wait_for_step(5, tmp_path, "lost", lost)
        hosts[1].lose_power()
        began = time.monotonic()
        assert end_of(lost, tmp_path, "lost", 4 * LOST_S) not in (0, None)
        print(f"the other host's ranks ended after {time.monotonic() - began:.1f} s")

        hosts[1].power_on()
        wait_for_ssh(hosts, tmp_path)
        again = [start(hosts, tmp_path, "lost", node=number) for number in (0, 1)]
        log = tmp_path / "lost.log"
        wait_for_step(14, tmp_path, "lost", again[1])
        hosts[0].lose_power()  # that of rank 0: its LOCK stays, and no process of the other host can tell
        assert end_of(again[1], tmp_path, "lost", 4 * LOST_S) not in (0, None)
        assert json.loads((tmp_path / "runs/lost/LOCK").read_text())["host"] == "alpha"

        last = start(hosts, tmp_path, "lost", node=1, alone=True)
        assert end_of(last, tmp_path, "lost", 120) == 0, log.read_text()[-3000:]
    assert "LOCK was left by a process that has ended; taking over" in log.read_text()
    assert "resumed " in log.read_text()
    assert outcome(tmp_path / "runs/lost") == outcome(tmp_path / "runs/whole")
    assert outcome(tmp_path / "runs/whole")[0] == STEPS
