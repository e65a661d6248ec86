"""Hugging Face Accelerate with our loader, whose state lies in a file of JSON beside Accelerate's own. Kill it and start it again.

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
    args = parser.parse_args()
    accelerator = Accelerator()
    torch.manual_seed(0)
    dataset = Dataset.open(args.dataset)
    # The rank and the number of processes are those of torch.distributed, which Accelerate has started: no prepare().
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
    if saved := sorted(args.out.glob("step-*")):
        accelerator.load_state(str(saved[-1]))
        loader.load_state_dict(json.loads((saved[-1] / "loader.json").read_text()))
        accelerator.print(f"going on at step {loader.step}", flush=True)
    for batch in loader:
        loss = cross_entropy(model(batch.images), batch.labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if loader.step % args.every == 0 or loader.step == loader.steps:
            accelerator.print(f"step {loader.step}: loss {loss.item():.3f}", flush=True)
            save(accelerator, args.out, loader)
    accelerator.end_training()


def save(accelerator: Accelerator, out: Path, loader: TrainLoader) -> None:
    """Written beside, then renamed: a kill at any moment leaves whole checkpoints alone, of which the last two are kept."""
    accelerator.save_state(str(out / "new"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Not through register_for_checkpointing, which would pickle it, and unpickle what lies there.
        (out / "new" / "loader.json").write_text(json.dumps(loader.state_dict()))
        (out / "new").rename(out / f"step-{loader.step:08d}")
        for old in sorted(out.glob("step-*"))[:-2]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
