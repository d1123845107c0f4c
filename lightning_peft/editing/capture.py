"""Read what a model computes inside, at chosen tokens, keeping nothing else and never running the model's head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.backbone.heads import HeadSite
from lightning_peft.backbone.layers import LayerSite
from lightning_peft.backbone.streams import one_stream
from lightning_peft.backbone.window import check_batch
from lightning_peft.editing.forward import run_trunk
from lightning_peft.tokens import Tokens

Site = HeadSite | LayerSite


class Capture:
    """Context manager that reads sites at chosen tokens of every row.

    The tokens are cut out inside the hooks, so a batch costs `B * layers * heads * head_dim` numbers where one token a
    row is read, not `T` times that.

    Args:
        backbone: a transformers model (its trunk is run, not its head) or any module called with the batch's tensors.
        sites: from `head_sites` (the heads' outputs, where they enter the output projection) or from `layer_sites`;
            all of one shape, but heads, which may be of several sizes: then zeros follow the smaller ones' values.
        positions: which tokens, in the language of `lightning_peft.tokens`.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from lightning_peft.editing import head_sites
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        ...                                      num_attention_heads=4, vocab_size=40))
        >>> with Capture(model, head_sites(model)) as capture:
        ...     capture(torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5)).shape
        torch.Size([3, 2, 4, 8])
    """

    def __init__(self, backbone: nn.Module, sites: Sequence[Site], positions: str = "last") -> None:
        if not sites:
            raise ValueError("There is no site to read.")
        self.shape = common_shape(sites)
        self.backbone = backbone
        self.sites = list(sites)
        self.positions = Tokens.parse(positions)
        self._index: dict[bool, Tensor] = {}  # of an encoder's tokens, and of all others: which are read
        self._count: dict[bool, int] = {}
        self._read: dict[int, Tensor] = {}
        self._handles: list[Any] = []
        self._running = False

    def __enter__(self) -> Capture:
        for i, site in enumerate(self.sites):
            module = self.backbone.get_submodule(site.name)
            if isinstance(site, HeadSite):
                self._handles.append(module.register_forward_pre_hook(self._reader(i)))
            else:
                self._handles.append(module.register_forward_hook(self._reader(i)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._read.clear()

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start: Tensor | None = None,
        mask: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Run the trunk on one batch.

        Args:
            input_ids: `[B, T]`, padded on either side.
            attention_mask: `[B, T]`, 1 on real tokens; default all.
            start: `[B]`, the number of each text's last prompt token, for positions that need it.
            mask: bool `[B, T]`, the tokens to read, in place of the positions.
            **inputs: of other models: `pixel_values`; `decoder_input_ids [B, T']` and `decoder_attention_mask`, to
                which positions then refer, but at an encoder's sites.

        Returns:
            `[M, layers, heads, head_dim]` (or `[M, layers, width]`) in float32 on the CPU: M is B where one token a row
            is read, else the chosen tokens row after row.

        Raises:
            RuntimeError: a site was not reached.
            ValueError: a row of which no token is chosen, positions that need `start`, or a row longer than the model
                can read.
        """
        check_batch(self.backbone, {"input_ids": input_ids, "attention_mask": attention_mask}, "texts to read")
        real = attention_mask
        if input_ids is not None and real is None:
            real = torch.ones_like(input_ids)
        encoders = {site.part == "encoder" for site in self.sites}
        self._index, self._count = {}, {}
        decoder = inputs.get("decoder_input_ids")
        if decoder is not None and False in encoders:
            decoder_mask = inputs.get("decoder_attention_mask")
            self._choose(False, torch.ones_like(decoder) if decoder_mask is None else decoder_mask, start, mask)
        if real is not None and (decoder is None or True in encoders):
            for encoder in encoders if decoder is None else {True}:
                self._choose(encoder, real, start, mask)
        encoder_only = encoders == {True} and decoder is None
        real = None if real is None else real.long()
        return self.run(lambda: run_trunk(self.backbone, input_ids, real, encoder_only=encoder_only, **inputs))

    @torch.no_grad()
    def run(self, forward: Any, index: Tensor | None = None) -> Tensor:
        """Call `forward()` and return the values at the sites.

        Args:
            forward: calls the backbone, or a part of it.
            index: which of the call's tokens to read, counted over the whole batch; default the last choice.
        """
        if index is not None:
            self._index, self._count = {False: index, True: index}, {}
        self._read.clear()
        self._running = True
        try:
            forward()
        finally:
            self._running = False
        if missed := [site.name for i, site in enumerate(self.sites) if i not in self._read]:
            kind = "head sites" if isinstance(self.sites[0], HeadSite) else "sites"
            raise RuntimeError(f"{len(missed)} {kind} were not reached by the forward pass, the first is {missed[0]}.")
        if len({len(values) for values in self._read.values()}) > 1:
            raise ValueError("An encoder and its decoder have different tokens: read the sites of one part at a time.")
        return torch.stack([self._read[i] for i in range(len(self.sites))], dim=1)

    def _choose(self, encoder: bool, real: Tensor, start: Tensor | None, mask: Tensor | None) -> None:
        """Note which tokens to read, from what is real."""
        real = real.bool()
        if mask is not None and mask.shape != real.shape:
            raise ValueError(f"The mask has shape {tuple(mask.shape)}, but the tokens have {tuple(real.shape)}.")
        places = real.long().cumsum(-1) - 1
        start = None if start is None else start.to(real.device)
        chosen = real & (self.positions.mask(places, start, real.sum(-1)) if mask is None else mask.to(real.device))
        if not chosen.any(-1).all():
            row = int((~chosen.any(-1)).nonzero()[0])
            raise ValueError(f"Row {row} has no token at {self.positions if mask is None else 'the mask'} to read.")
        self._index[encoder] = chosen.flatten().nonzero()[:, 0]
        self._count[encoder] = real.numel()

    def _reader(self, number: int) -> Any:
        site = self.sites[number]

        def read(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            if not self._running:  # somebody else's call of the model
                return
            x = args[0] if isinstance(site, HeadSite) else output
            x = x[0] if isinstance(x, tuple | list) else x
            encoder = site.part == "encoder"
            if encoder not in self._index:  # a picture, say: its patches are counted when they are seen
                self._choose(encoder, x.new_ones(x.shape[:2]), None, None)
            if isinstance(site, LayerSite):
                x = one_stream(self.backbone, x)
                if x.shape[-1] != site.width:
                    raise ValueError(
                        f"{site.name} gives {x.shape[-1]} features, not the {site.width} of the residual stream: read "
                        'the sites "attention" or "mlp".'
                    )
            x = x.reshape(-1, *site.shape)
            if len(x) != self._count.get(encoder, len(x)):
                raise RuntimeError(
                    f"{site.name} saw {len(x)} tokens, but the call has {self._count[encoder]}: its tokens cannot be "
                    "told apart."
                )
            self._read[number] = _padded(x[self._index[encoder].to(x.device)].float().cpu(), self.shape)

        return read


def common_shape(sites: Sequence[Site]) -> tuple[int, ...]:
    """Return the shape that what is read at one token of each site fits into.

    Raises:
        ValueError: layers of different widths.
    """
    shapes = {site.shape for site in sites}
    if len(shapes) > 1 and not all(isinstance(site, HeadSite) for site in sites):
        raise ValueError(f"Sites of different shapes ({sorted(shapes)}) cannot be read into one tensor.")
    return tuple(map(max, zip(*shapes, strict=True)))


def _padded(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Put zeros behind values `[M, ...]` of a smaller shape."""
    if values.shape[1:] == shape:
        return values
    whole = values.new_zeros(len(values), *shape)
    whole[:, : values.shape[1], : values.shape[2]] = values
    return whole


HeadCapture = Capture  # by the name of what it reads most
