"""Quantize a 16-bit model directory against transformers + bitsandbytes loading it in 4 bits.

    python benchmarks/model_quantization.py MODEL_DIRECTORY

The two take turns, each run in a process of its own; prints seconds after imports, and ours also
the peak of resident memory above the interpreter with torch imported.
"""

import subprocess
import sys
import tempfile

OURS = """
import sys, time
import halfbyte as hb
from halfbyte.memory.resident import resident
hb.quantize_model
idle = resident().total
begin = time.perf_counter()
hb.quantize_model(sys.argv[1], sys.argv[2] + "/out")
seconds = time.perf_counter() - begin
print(f"halfbyte {seconds:.2f} s, {(resident().peak - idle) / 2**20:.0f} MiB above idle")
"""
PEER = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
begin = time.perf_counter()
AutoModelForCausalLM.from_pretrained(
    sys.argv[1], quantization_config=config, device_map="cpu", dtype=torch.bfloat16
)
print(f"transformers + bitsandbytes {time.perf_counter() - begin:.1f} s")
"""
TURNS = 3


def main() -> None:
    """Take turns."""
    for _ in range(TURNS):
        for code in (OURS, PEER):
            with tempfile.TemporaryDirectory(dir=".") as scratch:
                command = [sys.executable, "-c", code, sys.argv[1], scratch]
                done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603
                print(done.stdout.strip())


if __name__ == "__main__":
    main()
