"""Hugging Face Accelerate with our loader. Kill it and start it again: it goes on.

The loader's state is a file of JSON next to Accelerate's own checkpoint.

    pip install accelerate
    wds-train shards digits
    python examples/accelerate_train.py digits
    accelerate launch --num_processes 2 examples/accelerate_train.py digits
"""

import argparse
import json
import shutil
from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy

from wds_train import Dataset, TrainLoader


def main() -> None:
    """Train, from the newest checkpoint in `--out` if there is one."""
    args = parse_arguments()
    accelerator = Accelerator()
    torch.manual_seed(0)
    dataset = Dataset.open(args.dataset)
    # No prepare() for the loader: its rank and number of processes are those of torch.distributed,
    # which Accelerate has started.
    loader = TrainLoader(
        dataset,
        args.batch,
        epochs=args.epochs,
        size=args.size,
        device=accelerator.device,
        normalize=True,
    )
    model = timm.create_model(args.model, num_classes=len(dataset.manifest.classes))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    # Go on where the newest checkpoint was made.
    saved = sorted(args.out.glob("step-*"))
    if saved:
        accelerator.load_state(str(saved[-1]))
        loader.load_state_dict(json.loads((saved[-1] / "loader.json").read_text()))
        accelerator.print(f"going on at step {loader.step}", flush=True)

    for batch in loader:
        loss = cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        # Inside the loop, loader.step counts this batch already.
        if loader.step % args.every == 0 or loader.step == loader.steps:
            accelerator.print(f"step {loader.step}: loss {loss.item():.3f}", flush=True)
            save(accelerator, args.out, loader)
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--batch", type=int, default=64, help="images of all processes together")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument(
        "--every", type=int, default=20, help="steps from one checkpoint to the next"
    )
    parser.add_argument("--out", type=Path, default=Path("accelerate"))
    return parser.parse_args()


def save(accelerator: Accelerator, out: Path, loader: TrainLoader) -> None:
    """Save a checkpoint, and keep the last two.

    It is written under another name, then renamed: a kill at any moment leaves whole checkpoints.

    Args:
        accelerator: Holds the model and the optimizer.
        out: The folder of all checkpoints.
        loader: The loader, whose step names the checkpoint.
    """
    accelerator.save_state(str(out / "new"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # register_for_checkpointing would pickle the state, and unpickle whatever lies there.
        (out / "new" / "loader.json").write_text(json.dumps(loader.state_dict()))
        (out / "new").rename(out / f"step-{loader.step:08d}")
        for old in sorted(out.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
