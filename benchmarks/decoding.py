"""Time of one decoding step: `python benchmarks/decoding.py MODEL [THREADS]`.

Processor time is what counts on a busy machine; with one thread it is that of an idle one, but for
what the other processes take of caches and of the core's other half.
"""

import statistics
import sys
import time

import torch

import halfbyte as hb
from halfbyte.generation.engine import Engine
from halfbyte.generation.sampling import Sampling

STEPS = 32
TURNS = 3
PROMPT = "The capital of France is a city in which many people live, and"


def main() -> None:
    """Decode greedily and print medians over the steps of each turn."""
    torch.set_num_threads(int(sys.argv[2]) if len(sys.argv) > 2 else 1)  # noqa: PLR2004
    model = hb.load(sys.argv[1])
    ids = model.tokenizer.encode(PROMPT)
    for _ in range(TURNS):
        engine = Engine(model.decoder, [ids], max_new_tokens=STEPS, sampling=Sampling())
        engine.step()  # the prompt
        processor, elapsed = [], []
        while engine.running:
            begin = time.process_time(), time.perf_counter()
            engine.step()
            processor.append(time.process_time() - begin[0])
            elapsed.append(time.perf_counter() - begin[1])
        print(
            f"a token: {1e3 * statistics.median(processor):.1f} ms of processor time, "
            f"{1e3 * statistics.median(elapsed):.1f} ms elapsed"
        )


if __name__ == "__main__":
    main()
