"""Hostfiles and the launcher of DeepSpeed, for jobs on several hosts.

    deepspeed --hostfile hosts.txt train_deepspeed.py -t pretrain       the launcher reads the hostfile
    deepspeed train_deepspeed.py -t pretrain --hostfile=hosts.txt       the launcher ignores it: the script reads it

The second form alone would silently train on this host only. So the script checks the hosts by ssh, then starts itself
again in the first form.
"""

import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from base.configuration import Parser, UserError, read_text

OPTIONS = (
    "--hostfile", "--include", "--exclude", "--num_nodes", "--num_gpus", "--master_addr", "--master_port",
    "--launcher", "--launcher_args", "--ssh_port", "--module_root",
)  # fmt: skip
SWITCHES = ("--no_ssh_check", "--force_multi")
# variables that a launcher sets in its processes, not to be passed on to another launcher
LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE",
)  # fmt: skip


def add_launcher_options(parser: Parser) -> None:
    """The launcher's options, accepted also after the script's name."""
    group = parser.add_argument_group("Options of DeepSpeed's launcher, before or after the script's name")
    for flag in OPTIONS:
        group.add_argument(flag, default=None)
    for flag in SWITCHES:
        group.add_argument(flag, action="store_true")


def read_hostfile(path: str) -> dict[str, int]:
    """Number of slots (processes) by host, from lines like "worker-1 slots=4"; raises UserError that names the line."""
    hosts: dict[str, int] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("#")[0].split()
        if not fields:
            continue
        slots = fields[1].removeprefix("slots=") if len(fields) == 2 else ""
        if not (slots.isdecimal() and int(slots) and fields[1].startswith("slots=")):
            raise UserError(f'{path}, line {number}: must be like "{fields[0]} slots=4", got {line.strip()!r}')
        if fields[0] in hosts:
            raise UserError(f"{path}, line {number}: {fields[0]} is listed twice")
        hosts[fields[0]] = int(slots)
    if not hosts:
        raise UserError(f'{path}: no host in it; each is a line like "worker-1 slots=4"')
    return hosts


def check_hosts(path: str, hosts: dict[str, int], ssh_port: str | None) -> None:
    """Raises UserError if a host does not answer by ssh, or has fewer GPUs than slots."""
    port = ["-p", ssh_port] if ssh_port else []
    count_gpus = "nvidia-smi --list-gpus 2>/dev/null | wc -l"

    def ask(host: str) -> subprocess.CompletedProcess:
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]  # fail instead of asking for a password
        return subprocess.run(["ssh", *options, *port, host, count_gpus], capture_output=True, text=True)

    with ThreadPoolExecutor() as pool:
        for (host, slots), answer in zip(hosts.items(), pool.map(ask, hosts), strict=True):
            if answer.returncode:
                reason = (answer.stderr.strip().splitlines() or ["no answer"])[-1]
                raise UserError(
                    f"{path}: no ssh to {host} without a password ({reason}); "
                    f"try `ssh {host}` by hand, or --no_ssh_check if the launcher does not use ssh"
                )
            n_gpus = int(answer.stdout) if answer.stdout.strip().isdecimal() else 0
            if n_gpus and slots > n_gpus:
                raise UserError(f"{path}: {host} has slots={slots}, but {n_gpus} GPUs")


def relaunch(args: Any, argv: list[str]) -> None:
    """Replace this process by DeepSpeed's launcher, which starts the script on the hosts of the hostfile."""
    hosts = read_hostfile(args.hostfile)
    launcher = args.launcher or "pdsh"
    if launcher == "pdsh" and len(hosts) > 1 and not shutil.which("pdsh"):
        raise UserError(
            "several hosts need pdsh: install it (Debian, Ubuntu: apt install pdsh), or use --launcher NAME"
        )
    if not args.no_ssh_check and (len(hosts) > 1 or args.force_multi):
        check_hosts(args.hostfile, hosts, args.ssh_port)
    launcher_options, script_arguments = split_arguments(argv)
    if len(hosts) == 1 and not args.force_multi:  # no ssh needed, but the launcher would check it all the same
        launcher_options += ["--no_ssh_check", "--master_addr", "127.0.0.1"]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *launcher_options, sys.argv[0], *script_arguments]
    print(
        f"started on this host alone, but {args.hostfile} names {len(hosts)}: starting again as\n"
        f"  deepspeed {shlex.join(command[3:])}",
        flush=True,
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    os.execve(sys.executable, command, environment)


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """The launcher's options among the arguments, and those of the script."""
    launcher_options, script_arguments = [], []
    arguments = iter(argv)
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag in SWITCHES:
            launcher_options.append(argument)
        elif flag in OPTIONS:
            launcher_options += [argument] if "=" in argument else [argument, next(arguments, "")]
        else:
            script_arguments.append(argument)
    return launcher_options, script_arguments
