"""Instance types and their prices.

The facts are AWS's own (EC2's instance types). The prices are those of us-east-1 in late 2025, for
Linux. A type without a price here needs one from AWS, or from a person.
"""

from dataclasses import dataclass

from wds_train.aws.cost import GPU_RATES, Machine

DATED = "late 2025, us-east-1"  # of PRICES, for people


@dataclass(frozen=True)
class Price:
    """The price of an instance in dollars per hour.

    Attributes:
        on_demand: The price on demand.
        spot: The lowest and the highest spot price that were seen.
    """

    on_demand: float
    spot: tuple[float, float]

    @property
    def middle(self) -> float:
        """The spot price to plan with."""
        return sum(self.spot) / 2


# type: GPU, GPUs, vCPUs, Gbit/s, GB of local disks, disks. A test compares them with EC2's answers.
_FACTS = {
    "g5.xlarge": ("A10G", 1, 4, 2.5, 250, 1),
    "g5.2xlarge": ("A10G", 1, 8, 5, 450, 1),
    "g5.4xlarge": ("A10G", 1, 16, 10, 600, 1),
    "g5.8xlarge": ("A10G", 1, 32, 25, 900, 1),
    "g5.12xlarge": ("A10G", 4, 48, 40, 3800, 1),
    "g5.48xlarge": ("A10G", 8, 192, 100, 7600, 2),
    "g6.xlarge": ("L4", 1, 4, 2.5, 250, 1),
    "g6.2xlarge": ("L4", 1, 8, 5, 450, 1),
    "g6.4xlarge": ("L4", 1, 16, 10, 600, 1),
    "g6.12xlarge": ("L4", 4, 48, 40, 3760, 4),
    "g6e.xlarge": ("L40S", 1, 4, 2.5, 250, 1),
    "g6e.2xlarge": ("L40S", 1, 8, 5, 450, 1),
    "g6e.4xlarge": ("L40S", 1, 16, 20, 600, 1),
    "g6e.12xlarge": ("L40S", 4, 48, 100, 3800, 2),
    "p4d.24xlarge": ("A100", 8, 96, 400, 8000, 8),
    "p5.4xlarge": ("H100", 1, 16, 100, 3800, 1),
    "p5.48xlarge": ("H100", 8, 192, 3200, 30400, 8),
    "p5en.48xlarge": ("H200", 8, 192, 3200, 30400, 8),
}
# The instances that a plan can be made for.
MACHINES = {
    name: Machine(name, gpu, gpus, vcpus, network, nvme, drives, GPU_RATES[gpu])
    for name, (gpu, gpus, vcpus, network, nvme, drives) in _FACTS.items()
}
# On demand, and the span of the spot price; dollars per hour.
PRICES = {
    "g5.2xlarge": Price(1.212, (0.36, 0.59)),
    "g6.2xlarge": Price(0.978, (0.37, 0.58)),
    "g6e.2xlarge": Price(2.242, (0.81, 1.66)),
    "g5.12xlarge": Price(5.672, (2.0, 3.4)),
    "p4d.24xlarge": Price(21.96, (6.0, 9.7)),
    "p5.48xlarge": Price(55.04, (11.3, 16.0)),
}
