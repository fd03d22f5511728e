"""Codebook: a bottleneck that lets an activation pass as a few codes of a fixed list, any of which can be deleted."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Form = Literal["encoded", "plain"]


@dataclass(frozen=True, kw_only=True)
class CodebookShape:
    """Sizes and form of a codebook."""

    d_model: int
    n_codes: int = 2048
    k: int = 8
    """Codes that one vector passes as."""
    d_code: int = 128
    form: Form = "encoded"
    """encoded: CodeUnlearn's, with an encoder and a decoder around; plain: that of Codebook Features, where codes are
    directions of the activation itself."""

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_codes:
            raise ValueError(f"codebook: got k = {self.k}, allowed: 1 to {self.n_codes}, its codes")
        if self.form == "plain" and self.d_code != self.d_model:
            raise ValueError(f"codebook: plain codes are as wide as the activation ({self.d_model}), got {self.d_code}")


@dataclass(frozen=True, kw_only=True)
class Passed:
    """What a codebook did to one batch of vectors, in units of its scale; kept for training and for counting codes."""

    codes: Int[Tensor, "batch pos k"]
    """The chosen ones, closest first."""
    x: Float[Tensor, "batch pos d_model"]
    decoded: Float[Tensor, "batch pos d_model"]
    z: Float[Tensor, "batch pos d_code"]
    z_codes: Float[Tensor, "batch pos d_code"]

    def at(self, mask: Bool[Tensor, "batch pos"]) -> "Passed":
        """Those of some tokens, as one row of vectors."""
        return Passed(**{name: value[mask] for name, value in vars(self).items()})


class Codebook(nn.Module):
    """x -> decode(mean of the k codes closest to encode(x)); nothing else of x passes.

    encoded: z = relu(W_e x + b_e) at a fixed length, codes by cosine, out = W_d z_q + b_d. plain: z = layer norm of x,
    out = z_q; codes by inner product with unit codes, which is cosine there, too. A deleted code is never chosen: the
    next closest step in. A plain module: its settings are its own, and many may live in one process.

    Source: CodeUnlearn, arXiv:2410.10866 (encoded; its number of codes and their sum or mean are not published), and
        Tamkin et al. 2023, arXiv:2310.17230 (plain).
    Differs from the source: the length of z is fixed. The cosine does not see it, so that straight-through gradients
        let it grow without end, away from codes and decoder.
    """

    def __init__(self, shape: CodebookShape, *, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.codes = nn.Parameter(torch.randn(shape.n_codes, shape.d_code))
            if shape.form == "encoded":
                self.encoder = nn.Linear(shape.d_model, shape.d_code)
                self.decoder = nn.Linear(shape.d_code, shape.d_model)
                self._start_as_the_identity()
            else:
                self.norm = nn.LayerNorm(shape.d_model)
        self.deleted: Bool[Tensor, " code"]
        self.register_buffer("deleted", torch.zeros(shape.n_codes, dtype=torch.bool))
        self.scale: Tensor
        """Of the activations' entries: inside, all are about 1 in size, whatever the model's norms."""
        self.register_buffer("scale", torch.ones(()))
        self.layer = 0
        """Where it stands, once it is in a model."""
        self.passed: Passed | None = None
        """Of the last forward pass."""
        self.is_out = False

    @torch.no_grad()
    def _start_as_the_identity(self) -> None:
        """As x = relu(x) - relu(-x), where d_code is wide enough: at first only length and choice of codes lose."""
        both = torch.eye(self.shape.d_model)
        both = torch.cat([both, -both])[: self.shape.d_code]
        self.encoder.weight[: len(both)] = both
        self.decoder.weight.zero_()
        self.decoder.weight[:, : len(both)] = both.T
        self.encoder.bias.zero_()
        self.decoder.bias.zero_()

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_code"]:
        """The vector that codes are compared with."""
        if self.shape.form == "plain":
            return self.norm(x)
        return F.normalize(self.encoder(x).relu(), dim=-1) * self.shape.d_model**0.5

    def decode(self, z: Float[Tensor, "*batch d_code"]) -> Float[Tensor, "*batch d_model"]:
        """The activation that codes stand for."""
        return self.decoder(z) if self.shape.form == "encoded" else z

    def closest(self, z: Float[Tensor, "*batch d_code"], n: int) -> Int[Tensor, "*batch n"]:
        """The n closest codes that are not deleted, closest first."""
        similarity = F.normalize(z, dim=-1) @ F.normalize(self.codes, dim=-1).T
        return similarity.masked_fill(self.deleted, -torch.inf).topk(n, dim=-1).indices

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The activation after the bottleneck; gradients go on to codes, decoder and (straight through) encoder."""
        if self.is_out:
            return x
        given = x.to(self.codes.dtype) / self.scale
        z = self.encode(given)
        chosen = self.closest(z.detach(), self.shape.k)
        z_codes = F.embedding(chosen, self.codes).mean(-2)
        decoded = self.decode(z_codes + (z - z.detach()))
        self.passed = Passed(codes=chosen, x=given, decoded=decoded, z=z, z_codes=z_codes)
        return (decoded * self.scale).to(x.dtype)

    def usable(self, codes: Sequence[int]) -> None:
        """Raise ValueError unless these are codes, and k are left when they are deleted."""
        if bad := [code for code in codes if not 0 <= code < self.shape.n_codes]:
            raise ValueError(f"codebook: got code {bad[0]}, allowed: 0 to {self.shape.n_codes - 1}")
        gone = self.deleted.clone()
        gone[list(codes)] = True
        if (left := int((~gone).sum())) < self.shape.k:
            raise ValueError(f"codebook: {left} codes would be left, and {self.shape.k} are needed for every vector")

    @contextmanager
    def without(self, codes: Sequence[int]) -> Iterator[None]:
        """Inside, these are deleted, too; afterwards, also on error, those are that were before.

        Raises:
            ValueError: as `usable`.
        """
        self.usable(codes)
        before = self.deleted.clone()
        try:
            self.deleted[list(codes)] = True
            yield
        finally:
            self.deleted.copy_(before)

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Inside, everything passes: the model around the codebook alone, as who has its weights can make it."""
        self.is_out = True
        try:
            yield
        finally:
            self.is_out = False

    def marks(self, codes: Sequence[int]) -> tuple[str, ...]:
        """By which each code is known again: a hash of its vector's signs, which rounding to another type leaves."""
        signs = torch.signbit(self.codes.detach()[list(codes)]).cpu().numpy()
        return tuple(hashlib.sha256(np.packbits(row).tobytes()).hexdigest()[:16] for row in signs)

    def settings(self) -> dict[str, object]:
        """The shape, as plain data."""
        return asdict(self.shape)


def codebook_loss(passed: Passed, *, reconstruction: float, commitment: float) -> Tensor:
    """How far what passed is from what came, and codes and encoder from each other.

    reconstruction * (|decoded - x|^2 / |x|^2 + |codes - z|^2 / |z|^2) + commitment * |z - codes|^2 / |z|^2.
    Means over vectors, relative to their mean square, so that the weights mean the same in every layer. The first
    moves decoder and codes to the activations, the last the encoder to its codes; x itself gets no gradient.

    Source: van den Oord et al. 2017, arXiv:1711.00937, equation 3 (codes and commitment).
    """
    x, z = passed.x.detach(), passed.z.detach()
    size, width = x.pow(2).mean().clamp(min=1e-12), z.pow(2).mean().clamp(min=1e-12)
    made = F.mse_loss(passed.decoded, x) / size + F.mse_loss(passed.z_codes, z) / width
    return reconstruction * made + commitment * F.mse_loss(passed.z, passed.z_codes.detach()) / width
