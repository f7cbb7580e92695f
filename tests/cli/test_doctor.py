"""`doctor` on this machine and on simulated ones."""

import dataclasses
import json
import os
import shutil
import tomllib
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from halfbyte.cli import app, doctor, software
from halfbyte.cli.diagnosis import diagnose
from halfbyte.cli.machine import Cpu, Disk, Machine, Memory, cache_directory, read_machine
from halfbyte.cli.output import Output
from halfbyte.cli.software import Backend, Software, Torch
from halfbyte.errors import BackendError
from halfbyte.memory.available import Available

GIB = 1 << 30

CPUINFO = """processor\t: 0
model name\t: Imaginary 9000
flags\t\t: fpu avx2 fma avx512f avx512_bf16

processor\t: 1
model name\t: Other
flags\t\t: fpu
"""
MEMINFO = """MemTotal:       16777216 kB
MemFree:         1048576 kB
MemAvailable:    8388608 kB
SwapTotal:       2097152 kB
SwapFree:        1048576 kB
HugePages_Total:       0
"""


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_processor_and_memory(tmp_path: Path) -> None:
    machine = read_machine(
        write_tree(
            tmp_path,
            {
                "proc/cpuinfo": CPUINFO,
                "proc/meminfo": MEMINFO,
                "sys/kernel/mm/transparent_hugepage/enabled": "always madvise [never]\n",
                "proc/driver/nvidia/version": "NVRM version: 999",
                "proc/loadavg": "1.25 0.50 0.25 1/100 4242\n",
            },
        ),
        {"OMP_NUM_THREADS": "3", "HOME": "/"},
    )
    assert machine.cpu.model == "Imaginary 9000"
    assert machine.cpu.features == ("avx2", "fma", "avx512f", "avx512_bf16")
    assert machine.cpu.quota is None
    assert machine.memory == Memory(
        total=16 * GIB,
        available=8 * GIB,
        limits=(),
        swap_total=2 * GIB,
        swap_used=1 * GIB,
        hugepages="never",
    )
    assert machine.thread_variables == {"OMP_NUM_THREADS": "3"}
    assert machine.nvidia_driver
    assert machine.load == 1.25


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    machine = read_machine(tmp_path, {})
    assert machine.cpu.features == ()
    assert machine.cpu.model
    assert machine.load is None
    assert machine.memory == Memory(None, None, (), 0, 0, None)


GROUP_V2 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/jobs/one\n",
    "sys/fs/cgroup/jobs/one/cpu.max": "max 100000\n",
    "sys/fs/cgroup/jobs/cpu.max": "150000 100000\n",
    "sys/fs/cgroup/cpu.max": "400000 100000\n",
}
GROUP_V1 = {
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job\n0::/\n",
    "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "150000",
    "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
}
GROUP_IN_CONTAINER = {
    # The path is the host's and does not exist below the container's mount.
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": "0::/docker/0123\n",
    "sys/fs/cgroup/cpu.max": "150000 100000",
}


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(GROUP_V2, id="v2-ancestor"),
        pytest.param(GROUP_V1, id="v1"),
        pytest.param(GROUP_IN_CONTAINER, id="container"),
    ],
)
def test_processor_quota(tmp_path: Path, files: dict[str, str]) -> None:
    assert read_machine(write_tree(tmp_path, files), {}).cpu.quota == 1.5


def test_memory_limits(tmp_path: Path) -> None:
    group = tmp_path / "group"
    mount = f"30 1 0:1 / {group} rw - cgroup2 none rw\n"
    root = write_tree(
        tmp_path,
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": mount,
            "group/memory.max": str(4 * GIB),
            "group/memory.current": str(3 * GIB),
        },
    )
    memory = read_machine(root, {}).memory
    assert memory.available == 1 * GIB
    assert memory.limits == (Available(1 * GIB, 4 * GIB, str(group)),)
    (group / "memory.max").write_text(str(32 * GIB))  # more than there is
    assert read_machine(root, {}).memory.limits == ()


def test_the_cache_is_where_xdg_says() -> None:
    assert cache_directory({"XDG_CACHE_HOME": "/c"}) == Path("/c/halfbyte")
    assert cache_directory({}) == Path.home() / ".cache" / "halfbyte"


def test_processors_without_affinity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert read_machine(tmp_path, {}).cpu.num_usable == 6


HEALTHY_MACHINE = Machine(
    system="Linux 6",
    cpu=Cpu("Imaginary 9000", ("avx2", "avx512_bf16"), num_usable=8, quota=None),
    memory=Memory(64 * GIB, 60 * GIB, (), 8 * GIB, 0, "madvise"),
    disks=(Disk("working directory", Path("/w"), 100 * GIB), Disk("cache", Path("/c"), 100 * GIB)),
    thread_variables={},
    nvidia_driver=False,
    load=3.0,
)
HEALTHY_TORCH = Torch("2.13.0+cpu", "", None, (), 8)
HEALTHY_SOFTWARE = Software(
    python="3.12.1",
    halfbyte="0.1.0",
    torch=HEALTHY_TORCH,
    required={"torch": "2.13.0", "typer": "1"},
    optional={"wandb": None},
    compiler="/usr/bin/c++",
    backends=(Backend("native", in_use=True, reason="avx512bf16"),),
)


def with_cpu(**changes: object) -> Machine:
    return dataclasses.replace(
        HEALTHY_MACHINE, cpu=dataclasses.replace(HEALTHY_MACHINE.cpu, **changes)
    )


def with_memory(**changes: object) -> Machine:
    return dataclasses.replace(
        HEALTHY_MACHINE, memory=dataclasses.replace(HEALTHY_MACHINE.memory, **changes)
    )


def with_machine(**changes: object) -> Machine:
    return dataclasses.replace(HEALTHY_MACHINE, **changes)


def with_torch(**changes: object) -> Software:
    return with_software(torch=dataclasses.replace(HEALTHY_TORCH, **changes))


def with_software(**changes: object) -> Software:
    return dataclasses.replace(HEALTHY_SOFTWARE, **changes)


IDLE = (Backend("native", in_use=False, reason="not built"),)

GROUP_LIMIT = Available(30 * GIB, 32 * GIB, "/sys/fs/cgroup/job")
BROKEN = (Backend("native", in_use=False, reason="does not load: undefined symbol", broken=True),)

M, S = HEALTHY_MACHINE, HEALTHY_SOFTWARE
PROBLEMS = [
    ("missing-package", "error", M, with_software(required={"typer": None, "torch": "2"})),
    (
        "torch-broken",
        "error",
        M,
        with_torch(version=None, failure="ImportError: libfoo.so"),
    ),
    ("torch-old", "error", M, with_torch(version="2.9.1")),
    ("torch-cuda-without-gpu", "note", M, with_torch(version="2.13.0", cuda="13.0")),
    ("gpu-unused", "note", with_machine(nvidia_driver=True), with_torch(cuda="13.0")),
    ("gpu-unused", "note", with_machine(nvidia_driver=True), with_torch(gpus=("Imaginary",))),
    ("gpu-unused", "note", with_machine(nvidia_driver=True), S),
    ("no-compiler", "warning", M, with_software(compiler=None, backends=IDLE)),
    ("native-unused", "warning", M, with_software(backends=IDLE)),
    ("kernels-broken", "error", M, with_software(backends=BROKEN)),
    ("old-cpu", "note", with_cpu(features=("avx512_bf16",)), S),
    ("low-memory", "warning", with_memory(available=1 * GIB), S),
    ("memory-limit", "note", with_memory(limits=(GROUP_LIMIT,)), S),
    ("memory-limit", "note", with_memory(limits=(GROUP_LIMIT,), total=None), S),
    ("swapping", "warning", with_memory(swap_used=5 * GIB), S),
    ("no-hugepages", "note", with_memory(hugepages="never"), S),
    ("memory-limit", "note", with_memory(limits=(Available(GIB, GIB, "RLIMIT_AS"),)), S),
    ("low-disk", "warning", with_machine(disks=(Disk("cache", Path("/c"), GIB),)), S),
    ("threads-malformed", "warning", with_machine(thread_variables={"OMP_NUM_THREADS": "two"}), S),
    ("threads-malformed", "warning", with_machine(thread_variables={"MKL_NUM_THREADS": "0"}), S),
    ("threads-too-many", "warning", with_machine(thread_variables={"OMP_NUM_THREADS": "9"}), S),
    ("threads-few", "warning", with_machine(thread_variables={"OMP_NUM_THREADS": "1"}), S),
    ("busy", "warning", with_machine(load=16.5), S),
    ("cpu-quota", "warning", with_cpu(quota=1.5), S),
]


def test_a_healthy_machine_has_no_problem() -> None:
    assert diagnose(HEALTHY_MACHINE, HEALTHY_SOFTWARE) == []
    assert diagnose(with_machine(thread_variables={"OMP_NUM_THREADS": "8"}), S) == []


@pytest.mark.parametrize(
    ("code", "severity", "machine", "software"),
    PROBLEMS,
    ids=[f"{i}-{problem[0]}" for i, problem in enumerate(PROBLEMS)],
)
def test_each_problem_is_found_alone_and_explained(
    code: str, severity: str, machine: Machine, software: Software
) -> None:
    (problem,) = diagnose(machine, software)
    assert (problem.code, problem.severity) == (code, severity)
    assert len(problem.what) > 20
    assert problem.fix or code in {"old-cpu", "memory-limit", "gpu-unused"}


def test_errors_come_first() -> None:
    problems = diagnose(with_cpu(quota=1.5, features=("sse2",)), with_torch(version="2.9.1"))
    assert [p.severity for p in problems] == ["error", "warning", "note"]


def test_a_missing_torch_is_one_problem_not_two() -> None:
    software = with_software(
        required={"torch": None}, torch=Torch(None, "No module named torch", None, (), 0)
    )
    (problem,) = diagnose(HEALTHY_MACHINE, software)
    assert problem.fix == "pip install torch"


def test_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["doctor"]) == 0
    out = capsys.readouterr().out
    for section in ("Software", "Kernels", "Machine"):
        assert section in out.splitlines()


def test_this_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.run(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert set(record) == {"software", "machine", "problems"}
    assert record["software"]["torch"]["version"].startswith("2.13")
    assert any(backend["in_use"] for backend in record["software"]["backends"])
    assert record["machine"]["cpu"]["num_usable"] >= 1
    assert "Machine" in captured.err


def test_an_error_makes_doctor_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = Torch(None, "ImportError: libfoo.so", None, (), 0)
    monkeypatch.setattr(
        doctor, "read_software", lambda: with_software(torch=broken, compiler=None, backends=())
    )
    monkeypatch.setattr(
        doctor, "read_machine", lambda: with_memory(limits=(GROUP_LIMIT,), total=None)
    )
    assert app.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "error: torch is installed and does not import: ImportError: libfoo.so" in out
    assert "    $ pip install --force-reinstall torch" in out
    assert "memory limit  32.0 GiB by /sys/fs/cgroup/job" in out
    assert "60.0 GiB available of unknown" in out


def test_no_problem_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show_problems(Output(), [])
    doctor.show_software(Output(), with_torch(cuda="13.0", gpus=("Imaginary GPU",)))
    out = capsys.readouterr().out
    assert out.startswith("No known problems.\n")
    assert "  Imaginary GPU" in out
    assert "CUDA 13.0" in out


def test_missing_packages_have_no_version() -> None:
    assert software.versions(["typer", "no-such-package"])["no-such-package"] is None


def test_required_packages_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert list(software.REQUIRED) == [name.partition(">=")[0] for name in project["dependencies"]]
    extras = project["optional-dependencies"]
    named = {name.partition(">=")[0] for extra in extras for name in extras[extra]}
    assert set(software.OPTIONAL) <= named


def test_a_torch_that_does_not_import() -> None:
    def load(name: str) -> ModuleType:
        raise OSError(f"{name}: cannot open shared object file")

    torch = software.read_torch(load)
    assert torch.version is None
    assert torch.failure == "OSError: torch: cannot open shared object file"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Imaginary GPU")
    assert software.read_torch().gpus == ("Imaginary GPU",)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert software.read_software().compiler is None


def test_low_disk_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1))
    machine = read_machine(tmp_path, {"XDG_CACHE_HOME": str(tmp_path / "none" / "yet")})
    assert [disk.free for disk in machine.disks] == [1, 1]
    assert machine.disks[1].path == tmp_path


def test_backends_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = (SimpleNamespace(name="native", in_use=False, reason="no compiler"),)
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(
        software.importlib, "import_module", lambda _: SimpleNamespace(status=lambda: statuses)
    )
    assert software.read_backends() == (Backend("native", in_use=False, reason="no compiler"),)


def test_kernels_that_do_not_load_are_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: str) -> ModuleType:
        raise BackendError("_native.so does not load", hint="Rebuild.")

    monkeypatch.setattr(software.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(software.importlib, "import_module", load)
    (backend,) = software.read_backends()
    assert backend.broken
    assert backend.reason == "_native.so does not load\nRebuild."


def test_without_kernels_the_reference_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software.importlib.util, "find_spec", lambda _: None)
    (backend,) = software.read_backends()
    assert backend.in_use
    assert backend.name == "reference"
