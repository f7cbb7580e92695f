"""`halfbyte doctor`: what this machine and installation can do, and what to mend."""

from dataclasses import asdict

import typer

from halfbyte.cli.diagnosis import Problem, diagnose
from halfbyte.cli.machine import Machine, read_machine
from halfbyte.cli.output import JsonValue, Output, current_output, format_bytes
from halfbyte.cli.parsing import example, new_app
from halfbyte.cli.software import OPTIONAL, Software, read_software

app = new_app()


@app.command(epilog=example("halfbyte doctor", "halfbyte doctor --json"))
def doctor() -> None:
    """Check versions, processor, kernels, memory and disk, and say how to fix what is wrong.

    The exit code is 1 when something is missing without which nothing works.
    """
    machine, software = read_machine(), read_software()
    problems = diagnose(machine, software)
    output = current_output()
    show_software(output, software)
    show_machine(output, machine)
    show_problems(output, problems)
    output.emit(
        {
            "software": asdict(software),
            "machine": machine_record(machine),
            "problems": [asdict(problem) for problem in problems],
        }
    )
    if any(problem.severity == "error" for problem in problems):
        raise typer.Exit(1)


def show_software(output: Output, software: Software) -> None:
    """Print versions and kernels."""
    torch = software.torch
    build = f"CUDA {torch.cuda}" if torch.cuda else "CPU build"
    output.heading("Software")
    rows = [
        ("halfbyte", software.halfbyte),
        ("Python", software.python),
        (
            "torch",
            f"{torch.version} ({build}, {torch.num_threads} threads)"
            if torch.version
            else torch.failure,
        ),
        ("C++ compiler", software.compiler or "none"),
    ]
    rows += [
        (name, f"{version or 'not installed'} ({OPTIONAL[name]})")
        for name, version in software.optional.items()
    ]
    _show(output, rows)
    output.heading("Kernels")
    _show(
        output,
        [
            (b.name, f"{'in use' if b.in_use else 'not in use'}: {b.reason}")
            for b in software.backends
        ],
    )
    if torch.version:
        output.heading("GPU")
        _show(output, [("", gpu) for gpu in torch.gpus] or [("", "none that torch can use")])


def show_machine(output: Output, machine: Machine) -> None:
    """Print hardware and limits."""
    cpu, memory = machine.cpu, machine.memory
    quota = "" if cpu.quota is None else f", limited to {cpu.quota:g} by its control group"
    output.heading("Machine")
    rows = [
        ("system", machine.system),
        ("processor", f"{cpu.model}, {cpu.num_usable} usable{quota}"),
        ("features", " ".join(cpu.features) or "unknown"),
        ("load", "unknown" if machine.load is None else f"{machine.load:g} in the last minute"),
        ("memory", f"{_size(memory.available)} available of {_size(memory.total)}"),
        ("huge pages", memory.hugepages or "unknown"),
        ("swap", f"{format_bytes(memory.swap_used)} used of {format_bytes(memory.swap_total)}"),
    ]
    rows += [
        ("memory limit", f"{format_bytes(limit.limit)} by {limit.because}")
        for limit in memory.limits
    ]
    rows += [
        ("disk", f"{format_bytes(disk.free)} free for the {disk.purpose} ({disk.path})")
        for disk in machine.disks
    ]
    _show(output, rows)


def show_problems(output: Output, problems: list[Problem]) -> None:
    """Print each problem and the command that fixes it."""
    if not problems:
        output.heading("No known problems.")
        return
    output.heading("Problems" if len(problems) > 1 else "Problem")
    for problem in problems:
        output.text(f"  {problem.severity}: {problem.what} [{problem.code}]")
        if problem.fix:
            output.text(f"    $ {problem.fix}")


def machine_record(machine: Machine) -> JsonValue:
    """The machine as JSON."""
    record: dict[str, JsonValue] = asdict(machine)
    record["disks"] = [{**asdict(disk), "path": str(disk.path)} for disk in machine.disks]
    return record


def _show(output: Output, rows: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        output.text(f"  {name:<{width}}  {value}" if name else f"  {value}")


def _size(count: int | None) -> str:
    return "unknown" if count is None else format_bytes(count)
