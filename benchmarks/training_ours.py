"""Steps of halfbyte for `benchmarks.training`; prints [targets, seconds] of each as JSON."""

import json
import time

import torch

import halfbyte as hb
from benchmarks.training_batches import Document, batches, parse_arguments
from halfbyte.adapters.spec import LoraSpec
from halfbyte.adapters.training import attach_new_adapter
from halfbyte.data.batch import Batch
from halfbyte.data.parse import NO_TARGET
from halfbyte.layers.segments import pack
from halfbyte.memory.allocator import return_freed_memory
from halfbyte.models.load import load_decoder
from halfbyte.training.step import compute_gradients, reusing_activations


def pack_documents(documents: list[Document]) -> Batch:
    """Side by side, each token's target the one after it."""
    targets = [
        [
            token if place >= document.num_prompt else NO_TARGET
            for place, token in enumerate(document.tokens[1:], start=1)
        ]
        + [NO_TARGET]
        for document in documents
    ]
    return Batch(
        torch.tensor([t for d in documents for t in d.tokens]),
        torch.tensor([t for each in targets for t in each]),
        pack([len(d.tokens) for d in documents]),
        tuple(str(i) for i in range(len(documents))),
    )


def main() -> None:
    """Take the steps."""
    arguments = parse_arguments(__doc__)
    dtype = getattr(torch, arguments.dtype)
    decoder = load_decoder(arguments.model, compute_dtype=dtype)
    return_freed_memory()  # as a run does
    spec = LoraSpec(rank=arguments.rank, alpha=2 * arguments.rank)
    adapter = attach_new_adapter(decoder, spec, seed=0)
    optimizer = hb.optim.make_optimizer("adamw", list(adapter.parameters.items()), lr=1e-4)
    accumulator = optimizer.accumulator()
    recompute = len(decoder.layers) if arguments.recompute else 0
    steps = []
    with reusing_activations(adapter.parameters.values()):
        for documents in batches(arguments):
            batch = pack_documents(documents)
            begin = time.perf_counter()
            compute_gradients(decoder, [batch], accumulator, recompute=recompute)
            optimizer.step()
            steps.append([batch.num_targets, time.perf_counter() - begin])
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
