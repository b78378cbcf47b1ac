"""What a text-to-image model is told of a batch of images."""

from typing import NamedTuple

import torch


class Captions(NamedTuple):
    """Embedded captions, as a batch of labels is for a class-conditional model.

    The empty caption travels along: it takes a caption's place where that is dropped, and guidance
    leads away from it. `to`, `pin_memory` and `chunk` are as a tensor's.

    Attributes:
        embeddings: [B, L, C], zero after a caption's end. mask: bool [B, L], true for its tokens.
        null_embeddings, null_mask: the same of the empty caption, [1, L, C] and [1, L].
    """

    embeddings: torch.Tensor
    mask: torch.Tensor
    null_embeddings: torch.Tensor
    null_mask: torch.Tensor

    def dropped(self, drop: torch.Tensor) -> "Captions":
        """With the empty caption where `drop` bool [B] is true."""
        drop = drop[:, None]
        return self._replace(
            embeddings=torch.where(drop[..., None], self.null_embeddings, self.embeddings),
            mask=torch.where(drop, self.null_mask, self.mask),
        )

    def guided(self) -> "Captions":
        """The batch of guidance, [2B, ...]: these captions, then as many empty ones."""
        B = len(self.mask)
        return self._replace(
            embeddings=torch.cat([self.embeddings, self.null_embeddings.expand(B, -1, -1)]),
            mask=torch.cat([self.mask, self.null_mask.expand(B, -1)]),
        )

    def to(self, device: torch.device, non_blocking: bool = False) -> "Captions":
        return Captions(*(part.to(device, non_blocking=non_blocking) for part in self))

    def pin_memory(self) -> "Captions":
        return Captions(*(part.pin_memory() for part in self))

    def chunk(self, number: int) -> list["Captions"]:
        """Cut, in order, into `number` batches of equal size."""
        pieces = zip(self.embeddings.chunk(number), self.mask.chunk(number), strict=True)
        return [Captions(*piece, self.null_embeddings, self.null_mask) for piece in pieces]
