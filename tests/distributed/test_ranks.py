"""What ranks agree on by: a hash that tells masks apart."""

from __future__ import annotations

import torch

from hf_sparse.training.distributed.ranks import hash_of_bytes


def test_no_bit_goes_unseen_and_no_place() -> None:
    packed = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    seen = {hash_of_bytes(packed).item()}
    for place in range(len(packed)):
        for bit in range(8):
            changed = packed.clone()
            changed[place] ^= 1 << bit
            seen.add(hash_of_bytes(changed).item())
    assert len(seen) == 1 + 8 * len(packed)
    swapped = packed.clone()
    swapped[0], swapped[1] = packed[1], packed[0]
    assert hash_of_bytes(swapped).item() not in seen
    assert hash_of_bytes(packed).item() == hash_of_bytes(packed.clone()).item()


def test_the_hash_is_that_of_integers_without_a_sign() -> None:
    def mixed(number: int) -> int:
        for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27), (1, 31)):
            number = (number ^ (number >> shift)) * multiplier % 2**64
        return number

    packed = torch.tensor([7, 0, 255, 128], dtype=torch.uint8)
    expected = sum(mixed(256 * place + byte) for place, byte in enumerate(packed.tolist(), 1)) % 2**64
    assert hash_of_bytes(packed).item() % 2**64 == expected
