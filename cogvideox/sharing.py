"""Say before a run what several cards gain: from the operations that each does, and the bytes that it receives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from .geometry import padding_frames, video_tokens
from .modules.sharded import Split
from .variants import LATENT_CHANNELS, full_config
from .words import size_text

if TYPE_CHECKING:
    from .handles import Model

#: Operations a second of a card in 16 bits without sparsity, from NVIDIA's data sheets, by what its name holds; longer
#: names first. Where the card is none of them, as an L40.
_PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "4090": 165e12, "3090": 71e12}
#: The share of them that products and attention reach, and of a link's bytes that an exchange does.
_REACHED, _LINK_REACHED = 0.5, 0.5
#: Bytes a second in one direction, of all links of a card: NVLink of the fourth generation, PCIe 4.0 with 16 lanes.
LINKS = {"nvlink": 450e9, "pcie": 32e9}


@dataclass(frozen=True)
class Gain:
    """What one guided step takes of each card, and how much faster several are.

    Attributes:
        operations: multiplications and additions of a card.
        received: bytes that it receives.
        rate: operations a second that it is counted with.
        faster: by link, the steps of one card over those of all.
    """

    split: Split
    operations: float
    received: float
    rate: float
    faster: Mapping[str, float]

    @property
    def text(self) -> str:
        count, rate = self.split.guidance * self.split.sequence, self.rate / 1e12
        return (
            f"{count} cards share {self.split.text}: a step is {self.operations / 1e12:,.0f} TFLOP a card, which "
            f"receives {size_text(int(self.received))}. Expected are steps {self.faster['nvlink']:.2f} x as fast over "
            f"NVLink, {self.faster['pcie']:.2f} x over PCIe 4.0 (counted with {rate:.0f} TFLOP/s a card and "
            "half of a link's bytes). Encoding and decoding are done by one card."
        )


def expected_gain(model: "Model", shape: Sequence[int], split: Split, guided: bool, device: str = "") -> Gain:
    """Estimate what sharing a step gains.

    Counted are a block's products, ``24 d^2`` operations a token, and its attention, ``4 S d``, for ``S`` tokens of
    width ``d``. With the tokens shared among ``n``, each card receives ``(n - 1) / n`` of its part of queries, keys,
    values and results in each block, and of the output; of the other half of guidance, a prediction in fp32. Nothing is
    counted as done while bytes are on their way.

    Args:
        shape: of the latent, ``[B, 16, T, H/8, W/8]``.
        device: the card's name.
    """
    config = full_config(model.weights.config)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    batch, _, length, *size = shape
    tokens = video_tokens(config, shape) + config["max_text_seq_length"]
    evaluation = batch * config["num_layers"] * tokens * (24.0 * width**2 + 4.0 * tokens * width)
    halves, n = 2 if guided else 1, split.sequence
    itemsize = model.weights.precision.dtype.itemsize
    received = 0.0
    if n > 1:
        part = batch * tokens / n * width * itemsize * (n - 1) / n
        output = batch * LATENT_CHANNELS * (length + padding_frames(length, config)) * prod(size) * itemsize
        received += (4 * config["num_layers"] * part + output * (n - 1) / n) * halves / split.guidance
    if split.guidance > 1:
        received += 4 * batch * LATENT_CHANNELS * (length + padding_frames(length, config)) * prod(size)
    rate = _REACHED * next((peak for name, peak in _PEAK.items() if name in device), _PEAK["L40"])
    own = evaluation * halves / split.guidance / n
    alone = evaluation * halves / rate
    faster = {link: alone / (own / rate + received / (_LINK_REACHED * speed)) for link, speed in LINKS.items()}
    return Gain(split, own, received, rate, faster)
