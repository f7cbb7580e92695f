"""Steps of PEFT + bitsandbytes for `benchmarks.training`; prints what `training_ours` prints."""

import json
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.training_batches import Document, batches, parse_arguments

IGNORED = -100


def pad_documents(documents: list[Document]) -> dict[str, torch.Tensor]:
    """A row a document, filled up to the longest."""
    longest = max(len(d.tokens) for d in documents)

    def rows(parts: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([part + [filler] * (longest - len(part)) for part in parts])

    return {
        "input_ids": rows([d.tokens for d in documents], 0),
        "attention_mask": rows([[1] * len(d.tokens) for d in documents], 0),
        "labels": rows(
            [[IGNORED] * d.num_prompt + d.tokens[d.num_prompt :] for d in documents], IGNORED
        ),
    }


def main() -> None:
    """Take the steps."""
    warnings.simplefilter("ignore")
    arguments = parse_arguments(__doc__)
    dtype = getattr(torch, arguments.dtype)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        device_map="cpu",
        dtype=dtype,
    )
    model = prepare_model_for_kbit_training(
        model,
        use_gradient_checkpointing=arguments.recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules="all-linear",
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    steps = []
    for documents in batches(arguments):
        batch = pad_documents(documents)
        num_targets = int((batch["labels"][:, 1:] != IGNORED).sum())
        begin = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append([num_targets, time.perf_counter() - begin])
    print(json.dumps(steps))


if __name__ == "__main__":
    main()
