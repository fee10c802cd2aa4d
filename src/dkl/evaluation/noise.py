"""Noise that belongs to samples: the same in whichever batch and process a sample is attacked.

Shapes: N samples, B samples of a batch.
"""

import hashlib

import torch
from torch import Tensor


class SampleDraw:
    """Uniform noise that depends on the seed and on each sample's own number, not on its batch.

    Args:
        seed: of the whole evaluation.
        sample_ids_B: [B] numbers of the samples.
        restart: 0-based restart of the attack.
        device: where the noise is wanted; it is made on the CPU, the same for every device.
    """

    def __init__(self, seed: int, sample_ids_B: Tensor, restart: int, device: torch.device) -> None:
        self.seed = seed
        self.sample_ids = sample_ids_B.tolist()
        self.restart = restart
        self.device = device
        self.num_calls = 0

    def __call__(self, num_columns: int) -> Tensor:
        """Return fresh noise [B, num_columns] in [0, 1)."""
        generator = torch.Generator()
        rows = []
        for sample_id in self.sample_ids:
            key = f"{self.seed}/{self.restart}/{self.num_calls}/{sample_id}".encode()
            generator.manual_seed(
                int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")
            )
            rows.append(torch.rand(num_columns, generator=generator))
        self.num_calls += 1
        return torch.stack(rows).to(self.device)


def checked_ids(sample_ids: Tensor | None, num_samples: int) -> Tensor:
    """Return the numbers [N] that key the samples' noise, on the CPU; None: 0 to N - 1.

    Raises:
        ValueError: when they are not one integer per sample.
    """
    if sample_ids is None:
        return torch.arange(num_samples)
    if sample_ids.shape != (num_samples,) or sample_ids.is_floating_point():
        raise ValueError(
            f"sample_ids must be {num_samples} integers, one per image, got {sample_ids.dtype} "
            f"{list(sample_ids.shape)}."
        )
    return sample_ids.cpu()
