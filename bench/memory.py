"""The memory that a run takes, against the estimate in its header: `python bench/memory.py [--device cpu] [--json]`

    python bench/memory.py
    python bench/memory.py --weights_dtype bf16 --optimizer adamw8bit

Trains an ACT of about 100M parameters with an average of its weights on the shipped dataset for a few steps, and saves after
each. On the CPU the peak is that of the process, from before the policy is built, and holds the copy of the checkpoint too;
on a GPU it is PyTorch's own count of what it has allocated there, and the copy is in the host's memory.

The batch is small, so that activations, which the estimate leaves out, are small too.
"""

import re
import tempfile
from pathlib import Path

import torch
from common import SHIPPED, benchmark_parser, print_json, take_step

LARGE = [
    "dim_model=1024",
    "dim_feedforward=3072",
    "chunk_size=20",
    "n_action_steps=20",
    "pretrained_backbone_weights=none",
]


def process_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process, by Linux."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def measure(args, work: Path) -> dict:
    from train import build_run, plan_run

    settings = {
        "dataset_id": str(SHIPPED),
        "episodes": "0:2",
        "policy": "act",
        "policy_args": args.policy_args,
        "image_size": [64, 64],
        "batch_size": 2,
        "ema_decay": args.ema_decay,
        "weights_dtype": args.weights_dtype,
        "optimizer": args.optimizer,
        "device": args.device,
        "num_threads": 1,
        "quiet": True,
        "output_dir": str(work),
    }
    with plan_run(settings) as plan:
        on_gpu = plan.distributed.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = process_bytes("VmRSS")
        with build_run(plan) as run:
            for _ in range(args.steps):
                take_step(run, run.next_batch())
                run.save()
                run.writer.wait()
            parameters = sum(parameter.numel() for parameter in run.policy.parameters())
            peak = torch.cuda.max_memory_allocated() if on_gpu else process_bytes("VmHWM") - before
        estimate = plan.memory.on_device
        if not on_gpu:
            estimate += plan.memory.checkpoint
        return {"parameters": parameters, "estimate": estimate, "peak": peak}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--policy_args", nargs="+", default=LARGE, metavar="NAME=VALUE")
    parser.add_argument("--weights_dtype", default="auto")
    parser.add_argument("--optimizer", default="auto")
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as work:
        result = measure(args, Path(work))
    estimate = result["estimate"]
    peak = result["peak"]
    print(f"act of {result['parameters'] / 1e6:.1f}M parameters on {args.device}, weights {args.weights_dtype}, "
          f"optimizer {args.optimizer}")  # fmt: skip
    print(f"estimate {estimate / 1e9:.3f} GB, measured {peak / 1e9:.3f} GB ({peak / estimate - 1:+.1%})")
    if args.json:
        print_json(result)


if __name__ == "__main__":
    main()
