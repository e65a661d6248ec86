"""A training loop of your own, in plain PyTorch.

Kill it whenever you like: the same command goes on where the last checkpoint was, with as many
processes as there are then. With as many as before, it ends with the weights of a training that was
never killed.

    wds-train shards digits
    python examples/plain_pytorch.py digits
    torchrun --nproc-per-node 2 examples/plain_pytorch.py digits
"""

import argparse
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from wds_train import Dataset, EvalLoader, TrainLoader

# Of the processes that torchrun starts, this one prints and saves.
LEADS = os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Train, from the checkpoint at `--out` if there is one."""
    args = parse_arguments()
    device = start_process()

    # Data, model and optimizer.
    dataset = Dataset.open(args.dataset)
    images: dict[str, Any] = {"size": args.size, "device": device, "normalize": True}
    loader = TrainLoader(dataset, args.batch, epochs=args.epochs, **images)
    val = EvalLoader(dataset, args.batch, **images)
    torch.manual_seed(0)
    model = small_model(len(dataset.manifest.classes)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True)

    # Go on where the last checkpoint was made.
    if args.out.exists():
        state = torch.load(args.out, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["loader"])
        say(f"going on at step {loader.step} of {loader.steps}")
    parallel = DistributedDataParallel(model) if distributed.is_initialized() else model

    for batch in loader:
        # A function of the step, so that there is no scheduler to save.
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 + math.cos(math.pi * batch.step / loader.steps))
        loss = cross_entropy(parallel(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Inside the loop, loader.step counts this batch already.
        if loader.step % loader.steps_per_epoch == 0:
            say(f"step {loader.step}: loss {loss.item():.3f}, top-1 {top1(model, val):.2f} %")
        if loader.step % args.every == 0 or loader.step == loader.steps:
            save(args.out, {"model": model, "optimizer": optimizer, "loader": loader})
    if distributed.is_initialized():
        distributed.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--batch", type=int, default=64, help="images of all processes together")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument(
        "--every", type=int, default=20, help="steps from one checkpoint to the next"
    )
    parser.add_argument("--out", type=Path, default=Path("plain.pt"))
    return parser.parse_args()


def start_process() -> torch.device:
    """Join the other processes if torchrun started this one, and return its device."""
    if "RANK" in os.environ:
        distributed.init_process_group()
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def small_model(classes: int) -> nn.Module:
    """Return a small convolutional network for so many classes."""
    layers: list[nn.Module] = []
    for before, channels in ((3, 16), (16, 32), (32, 64)):
        layers += [
            nn.Conv2d(before, channels, 3, stride=2, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


@torch.inference_mode()
def top1(model: nn.Module, val: EvalLoader) -> float:
    """Return a model's top-1 over the whole split, percent.

    Every process counts its own samples; together they have each one once.
    """
    model.eval()
    counts = torch.zeros(2)
    for batch in val:
        right = (model(batch.images).argmax(dim=1) == batch.labels).sum()
        counts += torch.tensor([right.item(), len(batch.labels)])
    model.train()
    if distributed.is_initialized():
        distributed.all_reduce(counts)
    return 100 * (counts[0] / counts[1]).item()


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if LEADS:
        print(line, flush=True)


def save(path: Path, holders: dict[str, Any]) -> None:
    """Save the state of all `holders` to `path`.

    It is written under another name, then renamed: a kill at any moment leaves a whole checkpoint,
    this one or the last.

    Args:
        path: The checkpoint.
        holders: What has a `state_dict`, by its name in the checkpoint.
    """
    if LEADS:
        new = path.with_suffix(".new")
        torch.save({name: holder.state_dict() for name, holder in holders.items()}, new)
        new.replace(path)


if __name__ == "__main__":
    main()
