"""Kill a training run again and again, resume it each time, and print how it ended.

Run as a script: CONFIG_DIRECTORY NUM_KILLS SEED ASSIGNMENT ... Torch is imported once; every
attempt is a fork of this process, which itself never computes, so forking is safe.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from halfbyte.training.config import Config
from halfbyte.training.run import resume, train
from training.tiny_run import make_config

MAX_SECONDS = 1.5
MAX_SYNCS = 60


def attempt(config: Config, rng: random.Random) -> bool:
    """One attempt in a child that is killed sooner or later; whether it came to the end."""
    by_time = rng.random() < 0.5
    delay, syncs = rng.uniform(0, MAX_SECONDS), rng.randrange(MAX_SYNCS)
    child = os.fork()
    if child == 0:
        run_in_child(config, None if by_time else syncs)
    if by_time:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise SystemExit(f"attempt failed with exit code {os.WEXITSTATUS(status)}")
    return os.WIFEXITED(status)


def run_in_child(config: Config, syncs: int | None) -> None:
    if syncs is not None:
        die_at_sync(syncs)
    try:
        torch.set_num_threads(1)
        directory = Path(config.output.dir)
        if (directory / "config.yaml").exists():
            resume(directory)
        else:
            train(config)
    except BaseException:  # noqa: BLE001  (whatever it is, it must not leave the child)
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def die_at_sync(count: int) -> None:
    """Kill this process in place of its `count`-th fsync: amid the writing of files."""
    real, seen = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        if seen > count:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    os.fsync = fsync


def main() -> None:
    directory, num_kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = random.Random(seed)  # noqa: S311  (moments to die at)
    kills, runs = 0, []
    while kills < num_kills or not runs:
        name = str(directory / f"killed-{len(runs)}")
        config = make_config(directory, *sys.argv[4:], **{"output.dir": name})
        while not attempt(config, rng):
            kills += 1
        runs.append(name)
    sys.stdout.write(json.dumps({"kills": kills, "runs": runs}) + "\n")


if __name__ == "__main__":
    main()
