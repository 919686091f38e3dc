"""Two hosts, really: network namespaces joined by a cable of two virtual ends, with an sshd in each.

Needs root and Linux's ip, and sshd and pdsh (Debian, Ubuntu: apt install iproute2 openssh-server pdsh).
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import DATA, FAST, ROOT, TINY
from processes import assert_close, curves, finish, newest_log, wait_for

from weights.checkpointing import load_checkpoint

ARGUMENTS = [
    "-t",
    "pretrain",
    *TINY,
    *FAST,
    *DATA,
    "--optimizer",
    "adamw",
    "--eval_interval",
    "10",
    "--eval_iters",
    "3",
]
TWENTY = [*ARGUMENTS, "--max_steps", "20"]
HOURS = [*ARGUMENTS, "--max_steps", "100000", "--save_interval", "5", "--decay_lr", "false", "--process_timeout", "0.1"]
INTERFACE = "nano0"  # the same name on both hosts, as gloo is told one

SSHD = """
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
"""
SSH = """
Host *
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
  ConnectTimeout 10
  ServerAliveInterval 3
  ServerAliveCountMax 3
"""


def lacking() -> str:
    """Why two hosts cannot be made here; empty: they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "sshd", "ssh-keygen", "pdsh") if not find(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"nano{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
        return "network namespaces are not allowed here"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Host:
    """A network namespace with an address and an sshd."""

    def __init__(self, name: str, address: str, folder: Path) -> None:
        self.name, self.address, self.folder = name, address, folder

    def call(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True, capture_output=True)

    def start(self, *command, cwd: Path) -> subprocess.Popen:
        environment = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "DS_ACCELERATOR": "cpu",
            "PDSH_RCMD_TYPE": "ssh",
            "PDSH_SSH_ARGS": f"-F {self.folder}/ssh_config %h",
        }
        return subprocess.Popen(
            ["ip", "netns", "exec", self.name, *map(str, command)],
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def link(self, state: str) -> None:
        self.call("ip", "link", "set", INTERFACE, state)


@contextlib.contextmanager
def two_hosts(folder: Path):
    """Two hosts that reach each other; of theirs nothing stays behind, whatever happens."""
    mark = secrets.token_hex(2)
    subnet = f"10.{77 + secrets.randbelow(100)}.{secrets.randbelow(250)}"
    hosts = [Host(f"nano{mark}{letter}", f"{subnet}.{i}", folder) for i, letter in enumerate("ab", 1)]
    folder.mkdir(mode=0o700)
    daemons = []
    try:
        for host in hosts:
            subprocess.run(["ip", "netns", "add", host.name], check=True)
        ends = [["name", INTERFACE, "netns", host.name] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", *ends[1]], check=True)
        for key in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        (folder / "ssh_config").write_text(SSH.format(folder=folder))
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it
        for host in hosts:
            host.call("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.call("ip", "link", "set", "lo", "up")
            host.link("up")
            config = folder / f"sshd_{host.name}"
            config.write_text(SSHD.format(address=host.address, folder=folder))
            command = ["ip", "netns", "exec", host.name, find("sshd"), "-D", "-e", "-f", config]
            daemons.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        yield hosts
    finally:
        for host in hosts:
            pids = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)
        for daemon in daemons:
            daemon.wait()
        shutil.rmtree(folder)


@pytest.fixture
def hosts(tmp_path_factory):
    reason = lacking()
    if reason:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("cluster") / "hosts") as both:
        yield both


def torchrun(hosts, *argv, cwd) -> list[subprocess.Popen]:
    """train_ddp.py on both hosts, as a person would start it on each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    command += ["--master_addr", hosts[0].address, "--master_port", "29400"]
    return [
        host.start(*command, "--node_rank", i, ROOT / "train_ddp.py", *argv, cwd=cwd) for i, host in enumerate(hosts)
    ]


def deepspeed(hosts, *argv, cwd) -> subprocess.Popen:
    """train_deepspeed.py on both hosts, started on the first, the hostfile named after the script."""
    (cwd / "hostfile.txt").write_text("".join(f"{host.address} slots=1\n" for host in hosts))
    exported = {"GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    (cwd / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in exported.items()))
    launcher = ["--hostfile=hostfile.txt", "--no_ssh_check", "--master_addr", hosts[0].address]
    return hosts[0].start(sys.executable, ROOT / "train_deepspeed.py", *launcher, *argv, cwd=cwd)


def one_process(prepared, call):
    assert call("train.py", *TWENTY, "--stage", "one").status == 0
    log = newest_log(prepared)
    curve = curves(log)
    log.unlink()
    return curve


def test_torchrun_trains_on_two_hosts_and_survives_a_cut_cable(hosts, prepared, call):
    expected = one_process(prepared, call)
    for job in torchrun(hosts, *TWENTY, cwd=prepared):
        status, _, err = finish(job)
        assert status == 0, err
    assert_close(expected, curves(newest_log(prepared)))

    last = prepared / "checkpoint" / "pretrain_last.pt"
    last.unlink()
    jobs = torchrun(hosts, *HOURS, cwd=prepared)
    wait_for(last, jobs[0])
    hosts[0].link("down")
    cut = time.monotonic()
    ends = [finish(job) for job in jobs]
    assert time.monotonic() - cut < 90
    assert all(status != 0 for status, _, _ in ends)
    assert any("lost the connection to the other processes" in err for _, _, err in ends)

    hosts[0].link("up")
    step = load_checkpoint(last)["step"]
    more = ["--max_steps", step + 5, "--from_checkpoint", "checkpoint/pretrain_last.pt"]
    for job in torchrun(hosts, *HOURS, *more, cwd=prepared):
        status, _, err = finish(job)
        assert status == 0, err
    assert load_checkpoint(last)["step"] == step + 5


def test_deepspeed_trains_on_two_hosts_and_survives_a_cut_cable(hosts, prepared, call):
    zero = ["--deepspeed", "--deepspeed_config", "deepspeed_zero2"]
    expected = one_process(prepared, call)
    status, out, err = finish(deepspeed(hosts, *zero, *TWENTY, cwd=prepared))
    assert status == 0, err
    assert "hostfile.txt names 2: starting again as" in out
    log = newest_log(prepared)
    assert json.loads(log.read_text().splitlines()[0])["environment"]["processes"] == 2
    assert_close(expected, curves(log), 1e-4)

    last = prepared / "checkpoint" / "pretrain_last"
    shutil.rmtree(last)
    job = deepspeed(hosts, *zero, *HOURS, cwd=prepared)
    wait_for(last / "latest", job)
    hosts[0].link("down")
    cut = time.monotonic()
    status, out, err = finish(job)
    assert status != 0 and "lost the connection to the other processes" in out + err
    assert time.monotonic() - cut < 90

    hosts[0].link("up")
    step = load_checkpoint(last)["step"]
    more = ["--max_steps", step + 5, "--from_checkpoint", "checkpoint/pretrain_last"]
    status, _, err = finish(deepspeed(hosts, *zero, *HOURS, *more, cwd=prepared))
    assert status == 0, err
    assert load_checkpoint(last)["step"] == step + 5
