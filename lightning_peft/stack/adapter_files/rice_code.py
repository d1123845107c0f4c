"""Sparse signs as few bits: the places of the non-zeros in Rice code, one bit for each sign.

A vector of signs in {-1, 0, 1} with non-zeros at random carries `H(k) + k` bits an entry, where k is the density and
H the binary entropy, which is `-((1 - k) log2(1 - k) + k log2(k / 2))`. The gap between two non-zeros is then
geometric, for which Golomb's codes are the optimal prefix codes (Gallager and van Voorhis 1975); Rice's are those
whose parameter is a power of two, here chosen for the fewest bits.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_LONGEST = 62  # bits of a remainder; a gap is an int64


def entropy_bound(density: float) -> float:
    """Return the bits an entry that no lossless code of random sparse signs can beat on average.

    Args:
        density: share of non-zeros, in [0, 1].

    Example:
        >>> round(16 / entropy_bound(0.05), 1), round(16 / entropy_bound(0.2), 1)  # against bfloat16
        (47.6, 17.4)
    """
    zeros, signs = 1.0 - density, density / 2
    return -sum(p * math.log2(q) for p, q in ((zeros, zeros), (density, signs)) if p > 0)


def pack_signs(signs: Tensor) -> dict[str, Tensor]:
    """Encode a vector of signs.

    Args:
        signs: `[N]` of -1, 0 and 1.

    Returns:
        `quotients`, `remainders` and `negative`, uint8 bit streams, and `layout`, int64 `[3]`: N, the number of
        non-zeros, and the number of bits of a remainder. A gap is `quotient * 2**bits + remainder`; quotients are
        unary (that many ones, then a zero), remainders have `bits` bits each, `negative` one bit a non-zero.

    Example:
        >>> import torch
        >>> signs = torch.tensor([0, 0, 1, 0, -1, 0])
        >>> torch.equal(unpack_signs(pack_signs(signs)), signs.to(torch.int8))
        True
    """
    places = signs.flatten().nonzero().flatten().numpy()
    gaps = np.diff(places, prepend=-1) - 1
    bits = _cheapest(gaps)
    quotients = gaps >> bits
    unary = np.ones(int(quotients.sum()) + len(gaps), dtype=np.uint8)
    unary[np.cumsum(quotients + 1) - 1] = 0
    remainders = (gaps[:, None] >> np.arange(bits)) & 1
    negative = (signs.flatten().numpy()[places] < 0).astype(np.uint8)
    return {
        "quotients": torch.from_numpy(np.packbits(unary)),
        "remainders": torch.from_numpy(np.packbits(remainders.astype(np.uint8).ravel())),
        "negative": torch.from_numpy(np.packbits(negative)),
        "layout": torch.tensor([signs.numel(), len(places), bits]),
    }


def unpack_signs(packed: dict[str, Tensor]) -> Tensor:
    """Decode the signs `[N]`, int8, that `pack_signs` encoded.

    Raises:
        ValueError: the streams do not fit each other.
    """
    total, count, bits = (int(v) for v in packed["layout"])
    sizes = {"remainders": -(-count * bits // 8), "negative": -(-count // 8)}
    if not (0 <= count <= total and 0 <= bits <= _LONGEST) or any(packed[n].numel() != w for n, w in sizes.items()):
        raise ValueError("its bit streams do not have the lengths they should.")
    unary = np.unpackbits(packed["quotients"].numpy())
    ends = np.flatnonzero(unary == 0)[:count]
    if len(ends) < count:
        raise ValueError(f"it holds {len(ends)} places where {count} are announced.")
    quotients = np.diff(ends, prepend=-1) - 1
    bit = np.unpackbits(packed["remainders"].numpy(), count=count * bits).reshape(count, bits).astype(np.int64)
    places = np.cumsum((quotients << bits) + (bit << np.arange(bits)).sum(1) + 1) - 1
    if count and places[-1] >= total:
        raise ValueError(f"it has a non-zero at {places[-1]}, beyond its {total} entries.")
    signs = np.zeros(total, dtype=np.int8)
    signs[places] = 1 - 2 * np.unpackbits(packed["negative"].numpy(), count=count).astype(np.int8)
    return torch.from_numpy(signs)


def _cheapest(gaps: np.ndarray) -> int:
    """Return the number of remainder bits for which the gaps take the fewest bits in all."""
    most = int(gaps.max(initial=0)).bit_length()
    return min(range(most + 1), key=lambda bits: int((gaps >> bits).sum()) + len(gaps) * (1 + bits))
