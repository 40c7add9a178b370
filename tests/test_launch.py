"""How a run is started: by torchrun and accelerate launch, what is refused, and what is left when a process is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from parallel import FSDP, free_port, in_processes
from test_run import bits, config_of

from safe_lab import config as configuration
from safe_lab import launch
from safe_lab.run import run
from safe_lab.section import ConfigError

CONFIGS = Path(__file__).parents[1] / "experiments" / "accelerate"
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc_per_node=2",
    "--master_addr=127.0.0.1",
    "--master_port={port}",
]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(CONFIGS / "two-cpus.yaml"), "--main_process_ip=127.0.0.1", "--main_process_port={port}"),
]


def start(tmp_path, tree, *words, launcher=TORCHRUN, **environment):
    """Start ``safe-lab train`` on two processes, in a group of its own."""
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    command = [
        *(word.format(port=free_port()) for word in launcher),
        "-m",
        "safe_lab",
        "train",
        str(tmp_path / "run.yaml"),
        *words,
    ]
    return subprocess.Popen(
        command,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process, *, seconds=120):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def workers_of(launcher):
    """Ids of the training processes of a launcher."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [int(child) for child in children if b"\0train\0" in Path(f"/proc/{child}/cmdline").read_bytes() + b"\0"]


def is_alive(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("rank", "environment"), [(0, {}), (1, FSDP)])
def test_a_killed_process_ends_the_job_and_resume_goes_on_to_the_same_bits(rank, environment, tiny_tree, tmp_path):
    tiny_tree["training"] |= {"epochs": 12}
    tiny_tree["freezing"] |= {"interval": 8}
    whole, config = (config_of(tiny_tree, variant=variant) for variant in ("whole", "killed"))
    in_processes(lambda processes: run(whole), environment=environment)

    process = start(tmp_path, tiny_tree, "variant=killed", **environment)
    while not list(config.run_folder.glob("checkpoints/step-*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    workers = workers_of(process.pid)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    began = time.monotonic()
    code, output = finish(process)
    assert code != 0 and time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in output
    assert not any(is_alive(pid) for pid in workers)
    assert not (config.run_folder / "result.json").exists()

    code, output = finish(start(tmp_path, tiny_tree, "variant=killed", "--resume", **environment))
    assert code == 0, output
    assert "resumed at step" in output
    left_alone, resumed = (bits(left.run_folder, with_bytes=False) for left in (whole, config))
    for entry in (left_alone, resumed):
        entry[2].pop("variant")
    assert left_alone == resumed


def test_accelerate_launch_starts_two_processes_on_cpu(tiny_tree, tmp_path):
    code, output = finish(start(tmp_path, tiny_tree, launcher=ACCELERATE))
    assert code == 0, output
    result = json.loads((tmp_path / "runs" / "tiny" / "default" / "seed-0" / "result.json").read_text())
    assert result["processes"]["count"] == 2
    assert output.count("task metrics") == 1


def test_accelerate_launch_with_fsdp2_spreads_the_weights(tiny_tree, tmp_path):
    """The shipped file, with CPUs for GPUs."""
    launcher = [word.replace("two-cpus.yaml", "fsdp2.yaml") for word in ACCELERATE]
    started = start(tmp_path, tiny_tree, launcher=[*launcher, "--num_processes=2"], ACCELERATE_USE_CPU="true")
    code, output = finish(started)
    assert code == 0, output
    result = json.loads((tmp_path / "runs" / "tiny" / "default" / "seed-0" / "result.json").read_text())
    assert (result["processes"]["count"], result["processes"]["sharded"]) == (2, True)
    assert output.count("2 processes, the base weights spread over them (FSDP2)") == 1


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_accelerate_configurations_are_what_accelerate_reads(file):
    found = load_config_from_file(str(file))
    kinds = {"one-gpu": "NO", "fsdp2": "FSDP"}
    assert str(found.distributed_type.value) == kinds.get(file.stem, "MULTI_GPU")
    assert found.num_processes >= found.num_machines >= 1


@pytest.mark.parametrize("word", ["training.epochs=none", "variant=taken", "training.batch_size=1", "--no-such-option"])
def test_what_all_processes_find_wrong_is_said_once(word, tiny_tree, tmp_path):
    taken = configuration.build(tiny_tree | {"variant": "taken"}).run_folder
    taken.mkdir(parents=True)
    (taken / "config.yaml").write_text("name: other\n")
    code, output = finish(start(tmp_path, tiny_tree, word))
    assert code != 0
    told = [line for line in output.splitlines() if "error: " in line]
    assert told and len(told) == len(set(told))
    assert "Traceback" not in output.split("torch/distributed")[0]


def test_what_one_process_alone_finds_wrong_is_said_by_it(tiny_tree, tmp_path):
    """As where a machine has no such file."""
    (tmp_path / "missing.py").write_text(
        "import os, sys\n"
        "sys.argv[0] = 'safe-lab'\n"
        "words = ['model.path=nowhere/at/all'] if os.environ['RANK'] == '1' else []\n"
        "from safe_lab.cli import main\n"
        "sys.exit(main([*sys.argv[1:], *words]))\n"
    )
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_tree))
    launcher = [word.format(port=free_port()) for word in TORCHRUN]
    done = subprocess.run(
        [*launcher, str(tmp_path / "missing.py"), "train", str(tmp_path / "run.yaml")],
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert [
        line for line in done.stderr.splitlines() if line.startswith("process 1: error: ") and "nowhere/at/all" in line
    ]


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ],
)
def test_what_cannot_freeze_is_refused_before_anything_loads(variable, name, tiny_tree, tmp_path):
    with pytest.raises(ConfigError, match=f"{name}.*accelerate launch --multi_gpu"):
        launch.check({variable: "true"})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tiny_tree))
    program = (
        "import sys; from safe_lab.cli import main\n"
        f"code = main(['train', {str(tmp_path / 'run.yaml')!r}])\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {variable: "true"}, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: accelerate launch was told to use " + name)
    assert not (tmp_path / "runs").exists()


def test_the_place_among_processes_is_read_from_the_environment():
    assert launch.rank({}) == 0 and not launch.is_one_of_several({})
    assert launch.rank({"RANK": "3", "WORLD_SIZE": "4"}) == 3 and launch.is_one_of_several({"WORLD_SIZE": "4"})
    assert launch.rank({"OMPI_COMM_WORLD_RANK": "1"}) == 1 and launch.is_one_of_several({"OMPI_COMM_WORLD_SIZE": "2"})
    assert not launch.is_one_of_several({"WORLD_SIZE": "1"})


@pytest.fixture
def nodes(request):
    """Two machines for the launcher: what a command begins with on each, its network interface, and the address of the first.

    Either both are this one, or each is a network namespace of it, with a cable between them.
    """
    if request.param == "one machine":
        yield [[], []], "lo", "127.0.0.1"
        return
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2's ip")
    names = [f"safe-lab-{os.getpid()}-{node}" for node in range(2)]

    def ip(*words):
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces here: ip {' '.join(words)}: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
        yield [["ip", "netns", "exec", name] for name in names], "cable", "10.77.0.1"
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize(
    ("nodes", "environment"),
    [
        pytest.param("one machine", {}, id="one machine, copies"),
        pytest.param("two hosts", FSDP, id="two hosts, fsdp2", marks=pytest.mark.hosts),
    ],
    indirect=["nodes"],
)
def test_machines_need_no_disk_in_common(environment, nodes, tiny_tree, tmp_path):
    """Two machines with two processes each; each has an output folder of its own."""
    before, interface, address = nodes
    tiny_tree["training"] |= {"epochs": 5}
    port = free_port()
    started = []
    for node in range(2):
        launcher = [*before[node], *TORCHRUN[:-2], f"--master_addr={address}", f"--master_port={port}"]
        launcher += ["--nnodes=2", f"--node_rank={node}"]
        tree = tiny_tree | {"output_dir": str(tmp_path / f"node{node}"), "savings": {"keep_cache": True}}
        (tmp_path / f"{node}").mkdir()
        started.append(
            start(tmp_path / f"{node}", tree, launcher=launcher, GLOO_SOCKET_IFNAME=interface, **environment)
        )
    for process in started:
        code, output = finish(process)
        assert code == 0, output
    first, second = (tmp_path / f"node{node}" / "tiny" / "default" / "seed-0" for node in range(2))
    result = json.loads((first / "result.json").read_text())
    assert result["processes"]["count"] == 4 and result["savings"]["cached_examples"] > 0
    assert [path.name for path in second.iterdir()] == ["cache-2"]
    rows = [(folder / "activations.bin").read_bytes() for folder in (first / "cache", second / "cache-2")]
    assert rows[0] == rows[1] != b""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_as_many_processes_as_gpus_train_through_nccl(tiny_tree, tmp_path):
    """On one GPU this is one process with NCCL set up: devices, object exchange and checkpoints go through it all the same."""
    count = torch.cuda.device_count()
    launcher = [word.replace("--nproc_per_node=2", f"--nproc_per_node={count}") for word in TORCHRUN]
    code, output = finish(start(tmp_path, tiny_tree, launcher=launcher), seconds=300)
    assert code == 0, output
    result = json.loads((tmp_path / "runs" / "tiny" / "default" / "seed-0" / "result.json").read_text())
    assert result["processes"]["count"] == count
    code, output = finish(
        start(tmp_path, tiny_tree, launcher=[*launcher[:-1], "--nproc_per_node=64", launcher[-1]]), seconds=300
    )
    assert code != 0 and "start as many" in output


@pytest.mark.parametrize(
    ("rank", "told"),
    [
        (0, {"of the cache", "of the run"}),
        (1, {"process 1: WARNING of the cache"}),
    ],
)
def test_warnings_are_shown_once_and_those_of_one_process_by_it_quiet_or_not(rank, told):
    program = (
        "import logging\n"
        "from safe_lab.console import Console, log_to\n"
        f"log_to(Console(quiet=True), rank={rank})\n"
        "logging.getLogger('safe_lab.prefix.cache').warning('of the cache')\n"
        "logging.getLogger('safe_lab.run').warning('of the run')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {line.removeprefix("WARNING").strip() for line in done.stderr.splitlines()} == told
