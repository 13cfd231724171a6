"""How fast do Base, Large and X-Large train on this GPU? One table, from the checkout alone, without Ray.

    make bench-gpu        or        python -m benchmarks.gpu_table --repeats 20

bf16 autocast with fp32 master weights, fused AdamW, crops of one length, as `benchmarks/pretrain_step.py` runs them; each row
in a process of its own, so that a row that does not fit into memory costs only itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

# size, crops, seconds of a crop, further arguments: the paper's audio per GPU, and twice that for Base
ROWS = (
    ("base", 8, 10.94, ()),
    ("base", 8, 10.94, ("--compile",)),
    ("base", 16, 10.94, ("--compile",)),
    ("large", 4, 14.06, ()),
    ("large", 4, 14.06, ("--compile",)),
    ("large", 8, 14.06, ("--compile", "--recompute")),
    ("xlarge", 2, 11.25, ()),
    ("xlarge", 2, 11.25, ("--compile",)),
    ("xlarge", 4, 11.25, ("--compile", "--recompute")),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_table", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    print(f"{'size':7} {'audio s':>8} {'how':22} {'audio h / h':>12} {'step ms':>9} {'of matmul peak':>15} {'GiB':>6}")
    for size, crops, seconds, extra in ROWS:
        command = [sys.executable, "-m", "benchmarks.pretrain_step", "--size", size, "--batch", str(crops)]
        command += ["--seconds", str(seconds), "--device", options.device, "--dtype", options.dtype, "--peers", "none"]
        command += ["--warmup", "5", "--repeats", str(options.repeats), "--json", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        how = " ".join(flag.removeprefix("--") for flag in extra) or "eager"
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
            print(f"{size:7} {crops * seconds:8.1f} {how:22} {reason[:90]}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        ours = row["ours"]
        print(
            f"{size:7} {row['audio_seconds']:8.1f} {how:22} {ours['audio_seconds_per_second']:12.0f} "
            f"{1000 * ours['step_seconds']:9.1f} {100 * ours['share_of_matmul_peak']:13.1f} % "
            f"{row.get('peak_memory_gib', 0):6.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
