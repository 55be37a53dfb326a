"""GPUs as their makers describe them: what they hold, how fast they could be, and how fast they speak to each other."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Peaks, which no run reaches."""

    names: tuple[str, ...]
    """What torch.cuda.get_device_name() may call it."""
    memory_gb: float
    """10⁹ bytes; NVIDIA means up to 7 % more by it."""
    tflops: tuple[float, float, float]
    """Dense, in (fp16 and bf16 with float32 sums, TF32, float32)."""
    within_gb: float
    """10⁹ bytes a second that it can send, and as many that it can get, between the GPUs of a node: NVLink or PCIe."""
    between_gb: float
    """The same between nodes: of NVIDIA's DGX and HGX systems, or else its share of 100 Gbit/s for eight."""


# From NVIDIA's data sheets of B200, H100, H200, A100, L40S and L4 (figures with sparsity halved, those of both
# directions, too), its DGX and HGX data sheets (one network port of 200 or 400 Gbit/s a GPU), and its white papers of
# the Blackwell, the Ada and the GA102 architecture. The same name always means the same peak, unless somebody has
# lowered the power limit.
H100_SXM, H100_NVL, A100 = (989.4, 494.7, 66.9), (835.5, 417.5, 60.0), (312.0, 156.0, 19.5)
ETHERNET = 100 / 8 / 8
GPUS = {
    "b200": Gpu(("NVIDIA B200",), 180, (2250.0, 1125.0, 75.0), 900, 50),
    "h200": Gpu(("NVIDIA H200",), 141, H100_SXM, 450, 50),
    "h200-nvl": Gpu(("NVIDIA H200 NVL",), 141, H100_NVL, 450, 50),
    "h100": Gpu(("NVIDIA H100 80GB HBM3",), 80, H100_SXM, 450, 50),
    "h100-nvl": Gpu(("NVIDIA H100 NVL",), 94, H100_NVL, 300, 50),
    "h100-pcie": Gpu(("NVIDIA H100 PCIe",), 80, (756.0, 378.0, 51.2), 64, 50),
    "a100-80": Gpu(("NVIDIA A100-SXM4-80GB",), 80, A100, 300, 25),
    "a100-40": Gpu(("NVIDIA A100-SXM4-40GB",), 40, A100, 300, 25),
    "a100-80-pcie": Gpu(("NVIDIA A100 80GB PCIe",), 80, A100, 32, 25),
    "a100-40-pcie": Gpu(("NVIDIA A100-PCIE-40GB",), 40, A100, 32, 25),
    "l40s": Gpu(("NVIDIA L40S",), 48, (362.05, 183.0, 91.6), 32, ETHERNET),
    "l4": Gpu(("NVIDIA L4",), 24, (121.0, 60.0, 30.3), 32, ETHERNET),
    "rtx5090": Gpu(("NVIDIA GeForce RTX 5090",), 32, (209.5, 104.8, 104.8), 64, ETHERNET),
    "rtx4090": Gpu(("NVIDIA GeForce RTX 4090",), 24, (165.2, 82.6, 82.6), 32, ETHERNET),
    "rtx3090": Gpu(("NVIDIA GeForce RTX 3090",), 24, (71.0, 35.6, 35.6), 32, ETHERNET),
}
PEAK_TFLOPS = {name: gpu.tflops for gpu in GPUS.values() for name in gpu.names}


def peak_of(tflops: tuple[float, float, float], precision: str | None, tf32: bool) -> float:
    """Of the three peaks that of the precision as accelerate calls it."""
    return tflops[0 if precision in ("bf16", "fp16") else 1 if tf32 else 2]
