"""timm's training, as its train.py goes (model, optimizer, scheduler, Mixup, the loop of an epoch, validation), with our
loaders in the place of its create_loader. With `--timm FOLDER` the same over timm's own loaders, of a folder of train/ and
val/, to compare the two.

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
        return ((batch.images, batch.labels) for batch in self.loader)


@dataclass(frozen=True)
class Data:
    train: Iterable[tuple[Tensor, Tensor]]  # an epoch, each time
    val: Iterable[tuple[Tensor, Tensor]]
    classes: int
    updates: int  # of an epoch


def main() -> None:
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
    args = parser.parse_args()
    random_seed(args.seed)
    data = theirs(args) if args.timm else ours(args)
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
        print(
            f"epoch {epoch + 1}: loss {loss:.3f}, top-1 {validate(model, data.val):.2f} %, {speed:.0f} img/s",
            flush=True,
        )


def ours(args: argparse.Namespace) -> Data:
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
    images: dict[str, Any] = {
        "input_size": (3, args.size, args.size),
        "num_workers": args.workers,
        "device": DEVICE,
    }
    folders = {split: create_dataset("", root=args.timm, split=split) for split in ("train", "val")}
    images_to_train = images | {"is_training": True, "color_jitter": None}
    train = create_loader(folders["train"], batch_size=args.batch, **images_to_train)
    val = create_loader(folders["val"], batch_size=args.batch, crop_pct=0.875, **images)
    return Data(train, val, len(folders["train"].reader.class_to_idx), len(train))


def train_one_epoch(
    model: nn.Module, numbered: Iterable, optimizer: Any, scheduler: Any, mixup: Mixup
) -> float:
    """As train.py's, over numbered pairs; the mean loss."""
    losses, criterion = AverageMeter(), SoftTargetCrossEntropy()
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
    """As train.py's; top-1 in percent."""
    top1 = AverageMeter()
    model.eval()
    for images, labels in val:
        top1.update(accuracy(model(images), labels)[0].item(), len(labels))
    return top1.avg


if __name__ == "__main__":
    main()
