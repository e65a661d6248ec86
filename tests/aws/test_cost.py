"""The plan of a training: near published figures, and changed by whatever should change it."""

from dataclasses import replace

import pytest

from wds_train.aws.cost import IMAGENET, OURS, Images, Software, pareto_front, plan, shrink
from wds_train.aws.prices import MACHINES, PRICES
from wds_train.config.presets import preset
from wds_train.config.recipe import ModelRecipe, Recipe
from wds_train.errors import UsageError

G5, P4D = MACHINES["g5.2xlarge"], MACHINES["p4d.24xlarge"]
# 330 images a second and vCPU, its own blur-pool, one set of weights.
FFCV = Software(ms=1000 / (330 / P4D.core), ms_per_kb=0.0, blur_pool=0.92, evaluated=1)
# Pillow and torchvision, on the core that the constants are for: 2.67 ms at 113 KB, 1.47 at 32.
PILLOW = Software(ms=0.99, ms_per_kb=0.0148, blur_pool=0.75, evaluated=2)


def of_epochs(name: str, epochs: int) -> Recipe:
    return replace(preset(name), schedule=replace(preset(name).schedule, epochs=epochs))


def test_ffcv_on_eight_a100s_takes_what_was_published() -> None:
    """libffcv/ffcv-imagenet: 88 epochs in 77.2 minutes."""
    planned = plan(of_epochs("standard", 88), P4D, IMAGENET, 21.96, spot=False, software=FFCV)
    assert planned.hours == pytest.approx(77.2 / 60, rel=0.15)


def test_the_earlier_project_paid_what_it_said() -> None:
    """118 epochs on a spot g5.2xlarge with Pillow: about four days, about $35."""
    low, _ = PRICES["g5.2xlarge"].spot
    planned = plan(of_epochs("seed", 118), G5, IMAGENET, low, spot=True, software=PILLOW)
    assert planned.hours == pytest.approx(4 * 24, rel=0.15)
    assert planned.usd == pytest.approx(35, rel=0.15)
    assert planned.bottleneck == "decode"


@pytest.mark.parametrize(
    ("change", "bottleneck"),
    [
        ({}, "GPU"),
        ({"vcpus": 2}, "decode"),
        ({"network": 0.1, "nvme": 0}, "network"),
        ({"network": 0.5}, "GPU"),  # but for the first epoch, which fills the cache
        ({"drives": 0.01}, "disk"),
        ({"gpu_rate": 1e6, "core": 9.0, "nvme": 140}, "network"),  # too small a disk for the cache
    ],
)
def test_the_bottleneck_is_named(change: dict[str, float], bottleneck: str) -> None:
    assert (
        plan(of_epochs("step", 20), replace(G5, **change), IMAGENET, 1.0, spot=True).bottleneck
        == bottleneck
    )


def test_phases_are_the_epochs_of_each_size_and_the_validations() -> None:
    planned = plan(preset("quick"), G5, IMAGENET, 1.0, spot=True)
    sides = [
        (phase.what, phase.side, phase.images / IMAGENET.train) for phase in planned.phases[:-1]
    ]
    assert sides == [
        ("training, network", 160, 1),
        ("training, disk", 160, 12),
        ("training, disk", 192, 3),
    ]
    assert planned.phases[-1].images == 16 * IMAGENET.val


@pytest.mark.parametrize(
    ("setting", "slower"),
    [
        (ModelRecipe(blur_pool=True), 1 / OURS.blur_pool),
        (ModelRecipe(name="resnet50d"), 1 / 0.885),
        (ModelRecipe(deep_stem=True, squeeze_excite=True), 1 / 0.885 / 0.8),
    ],
)
def test_layers_cost_what_they_cost(setting: ModelRecipe, slower: float) -> None:
    plain = plan(preset("step"), MACHINES["g6.12xlarge"], IMAGENET, 0, spot=True)
    with_layers = plan(
        replace(preset("step"), model=setting), MACHINES["g6.12xlarge"], IMAGENET, 0, spot=True
    )
    assert with_layers.phases[0].seconds == pytest.approx(slower * plain.phases[0].seconds)


def test_what_costs_besides_the_hours() -> None:
    free = plan(preset("step"), G5, IMAGENET, 0.0, spot=True)
    requests = 90 * IMAGENET.val / 20 + IMAGENET.train / 20  # every validation, and the first epoch
    storage = 1_331_167 * 115_400 / 1e9 * 0.023 / 720 * free.hours
    assert free.usd == pytest.approx(requests * 4e-7 + storage, rel=1e-6)
    assert plan(preset("step"), G5, IMAGENET, 2.0, spot=True).usd == pytest.approx(
        free.usd + 2 * free.hours
    )
    uninterrupted = plan(preset("step"), G5, IMAGENET, 0.0, spot=False)
    assert uninterrupted.hours < free.hours


def test_a_policy_takes_time_of_the_vcpus() -> None:
    def decode(name: str) -> float:
        data = replace(preset("step").data, auto_augment=name)
        return (
            plan(replace(preset("step"), data=data), G5, IMAGENET, 1, spot=True)
            .phases[0]
            .rates["decode"]
        )

    assert decode("") > decode("original") > decode("rand-m6-mstd0.5-inc1") == decode("rand-m9")


def test_smaller_images_are_as_small_as_the_recipe_allows_and_never_larger() -> None:
    assert shrink(IMAGENET, preset("strong")) == (
        256,
        replace(IMAGENET, bytes=pytest.approx(0.28 * 115_400)),
    )
    side, images = shrink(IMAGENET, preset("standard"))  # 256 px of the central .875
    assert side == 293
    assert images.bytes == pytest.approx(0.28 * 115_400 * (293 / 256) ** 2)
    assert shrink(Images(10, 10, 5_000), preset("strong"))[1].bytes == 5_000


def test_the_front_is_what_nothing_beats() -> None:
    assert pareto_front([(3, 70), (1, 60), (2, 60), (2, 75), (9, 75), (5, 80)]) == [1, 3, 5]
    assert pareto_front([]) == []


def test_a_model_whose_speed_is_not_known_is_refused() -> None:
    other = replace(preset("step"), model=ModelRecipe(name="vit_base_patch16_224"))
    with pytest.raises(
        UsageError, match=r"resnet50 and resnet50d alone, not that of model\.name = vit_base"
    ):
        plan(other, G5, IMAGENET, 1, spot=True)


def test_the_table_of_instances_is_what_ec2_says(aws_env: pytest.MonkeyPatch) -> None:
    """moto has EC2's own answers to `describe_instance_types`."""
    import boto3
    from moto import mock_aws

    with mock_aws():
        client = boto3.client("ec2", "us-east-1", aws_access_key_id="x", aws_secret_access_key="x")
        found = client.describe_instance_types(InstanceTypes=[*MACHINES])["InstanceTypes"]
    told = {each["InstanceType"]: each for each in found}
    for name, machine in MACHINES.items():
        (gpu,), disks = told[name]["GpuInfo"]["Gpus"], told[name]["InstanceStorageInfo"]["Disks"]
        cards = told[name]["NetworkInfo"]["NetworkCards"]
        assert (machine.gpu, machine.gpus) == (gpu["Name"], gpu["Count"]), name
        assert machine.vcpus == told[name]["VCpuInfo"]["DefaultVCpus"], name
        assert machine.nvme == sum(disk["SizeInGB"] * disk["Count"] for disk in disks), name
        assert machine.drives == sum(disk["Count"] for disk in disks), name
        assert machine.network == sum(card["BaselineBandwidthInGbps"] for card in cards), name
    assert set(PRICES) <= set(MACHINES)
