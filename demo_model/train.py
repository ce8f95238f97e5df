"""Train one stage of the demo model: the judge, the VAE, its decoder alone, or the flow.

python -m demo_model.train STAGE OUT --minutes M [--resume FOLDER] [--seed S]
torchrun --nproc-per-node 2 -m demo_model.train flow OUT --minutes M     two processes that share the flow's batches
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from .dataset import EVALUATION_SEED, Paintings
from .train_flow import train_flow
from .train_judge import train_judge
from .train_vae import train_vae


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("judge", "vae", "decoder", "flow"))
    parser.add_argument("out", type=Path, help="folder to write to, laid out like this one")
    parser.add_argument("--minutes", type=float, required=True, help="training time; the schedule follows it")
    parser.add_argument("--resume", type=Path, help="folder whose weights to start from")
    parser.add_argument("--seed", type=int, default=0, help="seed of the paintings and of the training noise")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels, a multiple of 16")
    parser.add_argument("--scenes", type=int, default=16384, help="how many scenes to paint")
    parser.add_argument("--batch", type=int, default=48, help="images a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    return parser.parse_args()


def main() -> None:
    """Run one stage."""
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    (args.out / "pipeline").mkdir(parents=True, exist_ok=True)
    # under torchrun every process paints its own scenes
    rank = int(os.environ.get("RANK", 0))
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    paintings = Paintings(args.scenes, args.size, args.seed + rank, device)
    if args.stage == "flow":
        train_flow(args.out, args.resume, args.minutes, paintings, args.batch, device, args.rate, args.seed, rank)
        return
    fresh = Paintings(256, args.size, EVALUATION_SEED, device)
    common = (args.out, args.resume, args.minutes, paintings, fresh, args.batch, device)
    if args.stage == "judge":
        train_judge(*common)
    else:
        train_vae(*common, decoder_only=args.stage == "decoder", rate=args.rate)


if __name__ == "__main__":
    main()
