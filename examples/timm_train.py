"""timm's training with our loaders instead of its create_loader.

It goes as timm's train.py does: model, optimizer, scheduler, Mixup, the loop of an epoch,
validation. With `--timm FOLDER` it uses timm's own loaders of a folder of train/ and val/, to
compare the two.

    wds-train shards /data/imagenette imagenette
    python examples/timm_train.py imagenette --epochs 4 --size 64
    python examples/timm_train.py --timm /data/imagenette --epochs 4 --size 64
"""

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, random_seed
from torch import Tensor, nn

from wds_train import Dataset, EvalLoader, TrainLoader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Pairs:
    """A loader's batches as timm's loops unpack them: normalised images and labels."""

    loader: TrainLoader | EvalLoader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            yield batch.images, batch.labels


@dataclass(frozen=True)
class Data:
    """Both splits of a dataset, by our loaders or by timm's.

    Attributes:
        train: The batches of an epoch, each time that it is iterated.
        val: The batches of the validation split.
        classes: The number of classes.
        updates: Batches of an epoch.
    """

    train: Iterable[tuple[Tensor, Tensor]]
    val: Iterable[tuple[Tensor, Tensor]]
    classes: int
    updates: int


def main() -> None:
    """Train, and print loss, top-1 and speed of every epoch."""
    args = parse_arguments()
    random_seed(args.seed)
    data = theirs(args) if args.timm else ours(args)

    # Model, optimizer, scheduler and Mixup are timm's.
    model = timm.create_model(args.model, num_classes=data.classes).to(DEVICE)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=args.epochs,
        warmup_lr=args.lr / 10,
        step_on_epochs=False,
        updates_per_epoch=data.updates,
    )
    mixup = Mixup(mixup_alpha=0.2, num_classes=data.classes)

    for epoch in range(args.epochs):
        begin = time.perf_counter()
        numbered = enumerate(data.train, epoch * data.updates)
        loss = train_one_epoch(model, numbered, optimizer, scheduler, mixup)
        speed = data.updates * args.batch / (time.perf_counter() - begin)
        score = validate(model, data.val)
        print(
            f"epoch {epoch + 1}: loss {loss:.3f}, top-1 {score:.2f} %, {speed:.0f} img/s",
            flush=True,
        )


def parse_arguments() -> argparse.Namespace:
    """Return the flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", nargs="?", default="digits")
    parser.add_argument("--timm", metavar="FOLDER")
    parser.add_argument("--model", default="resnet10t")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    return parser.parse_args()


def ours(args: argparse.Namespace) -> Data:
    """Return our loaders of a dataset."""
    dataset = Dataset.open(args.dataset)
    images: dict[str, Any] = {
        "size": args.size,
        "workers": args.workers,
        "device": DEVICE,
        "normalize": True,
    }
    train = TrainLoader(
        dataset, args.batch, epochs=args.epochs, seed=args.seed, per_epoch=True, **images
    )
    val = EvalLoader(dataset, args.batch, **images)
    return Data(Pairs(train), Pairs(val), len(dataset.manifest.classes), train.steps_per_epoch)


def theirs(args: argparse.Namespace) -> Data:
    """Return timm's loaders of a folder."""
    images: dict[str, Any] = {
        "input_size": (3, args.size, args.size),
        "batch_size": args.batch,
        "num_workers": args.workers,
        "device": DEVICE,
    }
    train_folder = create_dataset("", root=args.timm, split="train")
    val_folder = create_dataset("", root=args.timm, split="val")
    # No jitter, which ours has none of by default either.
    training = images | {"is_training": True, "color_jitter": None}
    train = create_loader(train_folder, **training)
    val = create_loader(val_folder, crop_pct=0.875, **images)
    return Data(train, val, len(train_folder.reader.class_to_idx), len(train))


def train_one_epoch(
    model: nn.Module, numbered: Iterable, optimizer: Any, scheduler: Any, mixup: Mixup
) -> float:
    """Train as train.py does, and return the mean loss.

    Args:
        model: The model.
        numbered: Batches of images and labels, each with the number of its step.
        optimizer: The optimizer.
        scheduler: The scheduler, which gets the number of every step.
        mixup: Mixes each batch.
    """
    losses = AverageMeter()
    criterion = SoftTargetCrossEntropy()
    model.train()
    for number, (images, labels) in numbered:
        mixed, targets = mixup(images, labels)
        loss = criterion(model(mixed), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(labels))
        scheduler.step_update(number + 1)
    return losses.avg


@torch.inference_mode()
def validate(model: nn.Module, val: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Validate as train.py does, and return top-1 in percent."""
    top1 = AverageMeter()
    model.eval()
    for images, labels in val:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


if __name__ == "__main__":
    main()
