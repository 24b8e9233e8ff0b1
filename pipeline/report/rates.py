"""How fast the device here is: from a table of GPUs, else from a matrix product.

In: a device. Out: its `Rates`.
"""

import time
from dataclasses import dataclass

import torch

# Data sheets: FLOP/s in bf16 (dense) and fp32 (no tensor cores), bytes/s of memory. The first name that fits counts.
GPUS = {
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "H200": (989e12, 67e12, 4.8e12),
    "A100": (312e12, 19.5e12, 2.0e12),
    "L40S": (362e12, 91.6e12, 0.864e12),
    "RTX 4090": (165e12, 82.6e12, 1.008e12),
}

# Shares of the rate that are reached, assumed: training and the rest on a GPU, both on a CPU, whose rate is measured.
GPU_TRAINING, GPU_INFERENCE, CPU_SHARE = 0.45, 0.55, 0.6

# What running a layer once costs however small it is, assumed: the starting of its kernels.
GPU_LAYER_SECONDS, CPU_LAYER_SECONDS = 5e-4, 1e-3

# Where a device is in no table.
ASSUMED_GPU_BANDWIDTH, ASSUMED_CPU_BANDWIDTH = 1e12, 1e10

MEASURED_SECONDS = 0.2


@dataclass(frozen=True)
class Rates:
    """Rates of a device.

    Attributes:
        name: of the device, with what is known of it.
        cuda: whether it is a GPU.
        bf16: FLOP/s of matrix products in bf16.
        fp32: in fp32.
        bandwidth: bytes/s of its memory.
        training: share of them that training reaches.
        inference: share that everything else reaches.
        layer_seconds: seconds to run a layer on nothing.
    """

    name: str
    cuda: bool
    bf16: float
    fp32: float
    bandwidth: float
    training: float
    inference: float
    layer_seconds: float

    def of(self, recipe: str) -> float:
        """FLOP/s of a compute recipe."""
        return self.bf16 if recipe == "bf16" else self.fp32


def rates_of(device: str, jobs: int) -> Rates:
    """The rates of a device.

    Args:
        device: as `device_of` says it.
        jobs: processes that share its cores, if it is the CPU; the rates are those of one.
    """
    if torch.device(device).type == "cpu":
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // jobs))
        rate = measured_rate(device, torch.float32)
        torch.set_num_threads(threads)
        name = f"CPU, {max(1, threads // jobs)} of {threads} threads: {rate / 1e9:.0f} GFLOP/s measured in fp32"
        return Rates(name, False, rate, rate, ASSUMED_CPU_BANDWIDTH / jobs, CPU_SHARE, CPU_SHARE, CPU_LAYER_SECONDS)
    name = torch.cuda.get_device_name(device)
    known = next((rates for key, rates in GPUS.items() if key in name), None)
    found = "from its data sheet"
    if known is None:
        known = measured_rate(device, torch.bfloat16), measured_rate(device, torch.float32), ASSUMED_GPU_BANDWIDTH
        found = "measured, for it is in no table here"
    bf16, fp32, bandwidth = known
    text = f"{name}: {bf16 / 1e12:.0f} TFLOP/s in bf16 and {fp32 / 1e12:.0f} in fp32, {found}"
    return Rates(text, True, bf16, fp32, bandwidth, GPU_TRAINING, GPU_INFERENCE, GPU_LAYER_SECONDS)


def measured_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product of a device, over a fifth of a second."""
    size = 1024 if torch.device(device).type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)  # a GPU is faster on constants
    float((matrix @ matrix)[0, 0])  # starts what starts once, and waits for it
    products, started = 0, time.perf_counter()
    while time.perf_counter() - started < MEASURED_SECONDS:
        float((matrix @ matrix)[0, 0])
        products += 1
    return 2 * size**3 * products / (time.perf_counter() - started)
