"""GPUs that are described, not there: facts of the chips, as XLA's GpuTargetConfigProto has them.

Sources: NVIDIA's data sheets and tuning guides of Ampere and Hopper. A chip of which a fact is not certain is not here
(the B200): a program compiled for a guess proves nothing.
"""

import dataclasses
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Chip:
    """A GPU as the compiler sees it; sizes in bytes, rates a second."""

    description: str
    capability: tuple[int, int]
    cores: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2: int
    shared_per_core: int
    shared_per_block: int  # what a block can ask for

    @property
    def proto(self) -> str:
        """The text form of the target description."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.description}"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 13 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores}
              fpus_per_core: {128 if major >= 9 else 64}
              clock_rate_ghz: {self.clock_ghz}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.l2}
              shared_memory_per_core: {self.shared_per_core}
              shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.shared_per_block}
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_core_limit: 2048
              threads_per_block_limit: 1024
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
        """


_H200 = Chip(
    "NVIDIA H200", (9, 0), cores=132, clock_ghz=1.98, memory=150_000_000_000, bandwidth=4_800_000_000_000,
    l2=52_428_800, shared_per_core=233_472, shared_per_block=232_448,
)  # fmt: skip
CHIPS: MappingProxyType[str, Chip] = MappingProxyType({
    "h200": _H200,
    "h100": dataclasses.replace(
        _H200, description="NVIDIA H100 80GB HBM3", memory=85_000_000_000, bandwidth=3_350_000_000_000
    ),
    "a100": Chip(
        "NVIDIA A100-SXM4-80GB", (8, 0), cores=108, clock_ghz=1.41, memory=85_000_000_000,
        bandwidth=2_039_000_000_000, l2=41_943_040, shared_per_core=167_936, shared_per_block=166_912,
    ),
})  # fmt: skip
