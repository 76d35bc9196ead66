"""Run every benchmark, each alone and in a process of its own, and build the report.

    python benchmarks/run_all.py --requests counterfact.json      (hours on two cores; --quick: minutes)
    python benchmarks/run_all.py --gpu                            (random weights of Llama-3-8B's shape; < 10 minutes)

Results are written to benchmarks/results/NAME_DEVICE.json, then benchmarks/results/REPORT.md and its plots. With
--quick they go to benchmarks/results/quick instead, and nothing that was measured in earnest is overwritten.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from harness import DEMO
from records import RESULTS, machine

HERE = Path(__file__).parent
CPU = {
    "anchors": [],
    "statistics": [],
    "solve": [],
    "edit": [],
    "evaluation": [],
    "cold_start": [],
    "curves": [],
    "adapters": [],
    "adapter_edits": [],
    "kernels": [],
}
GPU_SHAPE = "llama3-8b"
# PyTorch takes one edit at a time, so a few edits give its time per edit
GPU = {
    "anchors": ["--count", "256", "--baseline-count", "4", "--repeats", "2", "--modes", "all steps"],
    "statistics": ["--tokens", "65536", "--repeats", "2"],
    "solve": ["--repeats", "3", "--edits", "100", "1000", "--solved"],
    "kernels": [],
    "edit": ["--count", "64", "--baseline-count", "2", "--repeats", "1", "--methods", "fe"],
}
MINUTES = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small settings")
    parser.add_argument("--gpu", action="store_true", help="the set for one GPU, with random weights")
    parser.add_argument("--requests", type=Path, default=DEMO)
    parser.add_argument("--shape", default=GPU_SHAPE, help="with --gpu: whose shape")
    parser.add_argument("--only", nargs="+", help="names of benchmarks to run")
    args = parser.parse_args()
    folder = RESULTS / "quick" if args.quick else RESULTS
    device, failed, start = device_name(args.gpu), [], time.perf_counter()
    for name, options in (GPU if args.gpu else CPU).items():
        if args.only and name not in args.only:
            continue
        left = MINUTES * 60 - (time.perf_counter() - start) if args.gpu and not args.quick else None
        if left is not None and left < 30:
            print(f"no time left for {name}", flush=True)
            failed.append(name)
            continue
        command = [sys.executable, str(HERE / f"bench_{name}.py"), "--requests", str(args.requests)]
        command += ["--out", str(folder / f"{name}_{device}.json"), *([] if args.quick else options)]
        if args.gpu and name != "kernels":
            command += ["--shape", args.shape]
        if args.quick:
            command += ["--quick"]
        print(f"\n== {name}", flush=True)
        try:
            done = subprocess.run(command, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"{name} was stopped: the {MINUTES} minutes are over", flush=True)
            failed.append(name)
            continue
        if done.returncode:
            failed.append(name)
    subprocess.run([sys.executable, str(HERE / "report.py"), "--results", str(folder)], check=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def device_name(gpu: bool) -> str:
    """Short name for files: of the GPU, or of the CPU and its cores."""
    if gpu and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        words = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    else:
        here = machine()
        words = f"{here['cpu']} {here['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", words.lower().replace("nvidia", "")).strip("-")


if __name__ == "__main__":
    main()
