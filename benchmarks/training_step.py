"""Time training steps of an adapter on a 4-bit model: documents of one length, loss on all tokens.

    python benchmarks/training_step.py MODEL_DIRECTORY [DOCUMENTS] [TOKENS]

Prints the median step after a warm-up, tokens a second and the process's peak resident memory.
"""

import sys
import time

import torch

import halfbyte as hb
from halfbyte.adapters.spec import LoraSpec
from halfbyte.adapters.training import attach_new_adapter
from halfbyte.layers.cross_entropy import linear_cross_entropy
from halfbyte.layers.segments import pack
from halfbyte.memory.resident import peak_bytes
from halfbyte.models.load import load_decoder

STEPS = 4
RANK = 16


def main() -> None:
    """Take a few steps."""
    documents, tokens = (int(a) for a in (*sys.argv[2:4], "4", "512")[:2])
    count = documents * tokens
    decoder = load_decoder(sys.argv[1])
    adapter = attach_new_adapter(decoder, LoraSpec(rank=RANK), seed=0)
    optimizer = hb.optim.make_optimizer("adamw", list(adapter.parameters.items()), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    row_T = torch.randint(0, decoder.config.vocabulary_size, (count,), generator=generator)
    segments = pack([tokens] * documents)
    seconds = []
    for _ in range(STEPS + 1):
        begin = time.perf_counter()
        features = decoder(row_T, segments)
        (linear_cross_entropy(features, row_T.roll(-1), decoder.head) / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    median = sorted(seconds[1:])[STEPS // 2]
    print(
        f"{documents} x {tokens} tokens, rank {RANK}: {median:.2f} s a step, "
        f"{count / median:.0f} tokens/s, peak {peak_bytes() / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
